-- Acks the given deliveries that are still the last of their entries. KEYS: stream. ARGV: consumer, the
-- command that deletes the entries, or an empty text, group, n ids in ascending order, their n delivery
-- counts. Returns the positions of the lost ones.
local ARGV = ARGV
local stream, consumer, group, n = KEYS[1], ARGV[1], ARGV[3], (#ARGV - 3) / 2

-- One XPENDING finds nearly all of them, as they tend to stand side by side.
local counts = {}
local pending = redis.call('XPENDING', stream, group, ARGV[4], ARGV[3 + n], 2 * n - 1, consumer)
for i = 1, #pending do counts[pending[i][1]] = pending[i][4] end

local ours, lost = {}, {}
for i = 1, n do
  local id = ARGV[3 + i]
  local count = counts[id]
  if not count then
    local one = redis.call('XPENDING', stream, group, id, id, 1, consumer)[1]
    count = one and one[4]
  end
  if count == tonumber(ARGV[3 + n + i]) then
    ours[#ours + 1] = id
  else
    lost[#lost + 1] = i
  end
end
if #ours > 0 then
  -- The write that the server can refuse comes first, and is one for all, so nothing is left half done.
  done(stream, group, ours, ARGV[2])
end
return lost
