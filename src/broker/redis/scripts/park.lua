-- ARGV[5]: the count that the entry keeps; ARGV[6]: milliseconds until it is due.
if not is_owned() then return 'lost' end
local exists = entry()
if exists then
  -- The write that memory pressure can refuse comes first: nothing is left half done.
  redis.call('ZADD', KEYS[2], string.format('%.0f', now() + ARGV[6]), id .. ':' .. ARGV[5])
end
redis.call('XACK', stream, group, id)
return exists and 'settled' or 'gone'
