-- Delivers parked entries that are due. KEYS: stream, delayed set. ARGV: group, consumer, limit.
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local taken = {}
for _, member in ipairs(redis.call('ZRANGE', KEYS[2], '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[3])) do
  local id, count = string.match(member, '^(.+):(%d+)$')
  local deliveries = count + 1
  -- FORCE: the entry is in no pending list while it is parked. One that was deleted or trimmed
  -- meanwhile is not claimed.
  local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'RETRYCOUNT', deliveries, 'FORCE')
  redis.call('ZREM', KEYS[2], member)
  if claimed[1] then taken[#taken + 1] = { claimed[1][1], deliveries, claimed[1][2] } end
end
return taken
