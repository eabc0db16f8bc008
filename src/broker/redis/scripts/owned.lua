-- Prepended to every script that settles: KEYS begin with the stream, the delayed set and the
-- dead letters, if there are any; ARGV begins with group, consumer, id and delivery count. A delivery is known by its
-- consumer *and* its count: the entry may have come back to the same consumer.
local stream, group, consumer, id, count = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local function is_owned()
  local pending = redis.call('XPENDING', stream, group, id, id, 1)[1]
  return pending and pending[2] == consumer and pending[4] == tonumber(count)
end

local function entry()
  return redis.call('XRANGE', stream, id, id)[1]
end

local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
