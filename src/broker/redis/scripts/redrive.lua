-- KEYS: the dead letters, and the stream that the entry came from. ARGV: the id, the number of the redrive,
-- and the names of the fields that a dead letter has and a job has not.
local found = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not found then return 'gone' end
-- Lua hands over less than 8 000 arguments at once. The client moves this one.
if #found[2] > 6000 then return 'large' end
local dropped = {}
for i = 3, #ARGV do dropped[ARGV[i]] = true end
local fields = {}
for i = 1, #found[2], 2 do
  if not dropped[found[2][i]] then
    fields[#fields + 1] = found[2][i]
    fields[#fields + 1] = found[2][i + 1]
  end
end
fields[#fields + 1] = 'x-redriven'
fields[#fields + 1] = ARGV[2]
-- Fails here if there is no right to delete, before anything is done: no entry has this id.
redis.call('XDEL', KEYS[1], '0-0')
if not redis.call('XADD', KEYS[2], 'NOMKSTREAM', '*', unpack(fields)) then return 'nowhere' end
redis.call('XDEL', KEYS[1], ARGV[1])
return 'moved'
