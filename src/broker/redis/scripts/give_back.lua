-- Gives back all entries of a consumer, and deletes the consumer. KEYS: stream, delayed set. ARGV: group,
-- consumer, 1 if the server has XNACK, and the ids of entries that nobody has seen, whose delivery doesn't
-- count.
local stream, group, consumer, has_nack = KEYS[1], ARGV[1], ARGV[2], ARGV[3] == '1'
local unseen = {}
for i = 4, #ARGV do unseen[ARGV[i]] = true end
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
while true do
  local pending = redis.call('XPENDING', stream, group, '-', '+', 100, consumer)
  if #pending == 0 then break end
  for _, one in ipairs(pending) do
    local id, count = one[1], one[4]
    local exists = redis.call('XRANGE', stream, id, id)[1]
    if exists and has_nack then
      redis.call('XNACK', stream, group, unseen[id] and 'SILENT' or 'FAIL', 'IDS', 1, id)
    else
      if unseen[id] then count = count - 1 end
      if exists then redis.call('ZADD', KEYS[2], now, id .. ':' .. count) end
      redis.call('XACK', stream, group, id)
    end
  end
end
redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer)
return 'settled'
