-- Takes over entries that nobody settled. KEYS: stream. ARGV: group, consumer, limit, least idle
-- time in ms, cursor, idle time in ms after which a consumer without entries is deleted.
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local reply = redis.call('XAUTOCLAIM', stream, group, consumer, ARGV[4], ARGV[5], 'COUNT', ARGV[3])
local taken = {}
for _, entry in ipairs(reply[2]) do
  -- Redis 6.2 returns false for an entry that was deleted.
  if entry then
    local pending = redis.call('XPENDING', stream, group, entry[1], entry[1], 1)[1]
    taken[#taken + 1] = { entry[1], pending[4], entry[2] }
  end
end
if reply[1] == '0-0' then
  local ours = '%-' .. string.rep('%x', 16) .. '$'
  for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
    local info = {}
    for i = 1, #flat, 2 do info[flat[i]] = flat[i + 1] end
    if info.pending == 0 and info.idle > tonumber(ARGV[6]) and info.name ~= consumer
      and string.find(info.name, ours) then
      redis.call('XGROUP', 'DELCONSUMER', stream, group, info.name)
    end
  end
end
return { reply[1], taken }
