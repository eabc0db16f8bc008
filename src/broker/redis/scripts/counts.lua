-- Counts the new entries of a group, the parked ones that are due, and the pending ones of one consumer and of all; changes
-- nothing. KEYS: stream, delayed set. ARGV: group, consumer.
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local function field(reply, name)
  for i = 1, #reply, 2 do
    if reply[i] == name then return reply[i + 1] end
  end
end
local new, own = 0, 0
for _, found in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
  if field(found, 'name') == group then
    local last = field(found, 'last-delivered-id')
    -- The lag is not known before 7.0 and after some deletions, and has counted deleted entries.
    if #redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 1) > 0 then
      new = math.max(field(found, 'lag') or 1, 1)
    end
  end
end
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local due = redis.call('ZCOUNT', KEYS[2], '-inf', now)
local pending = redis.call('XPENDING', stream, group)
for _, one in ipairs(pending[4] or {}) do
  if one[1] == consumer then own = tonumber(one[2]) end
end
return { new, due, own, pending[1] }
