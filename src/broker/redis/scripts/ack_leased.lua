-- Acks and deletes entries that nobody else can have. KEYS: stream. ARGV: group, their ids. Returns
-- how many of them were pending.
local pending = redis.call('XACK', KEYS[1], unpack(ARGV))
redis.call('XDEL', KEYS[1], unpack(ARGV, 2))
return pending
