-- ARGV[5]: the command that deletes the entry, or an empty text; ARGV[6]: the kind; ARGV[7]: the message,
-- if there is one.
if not is_owned() then return 'lost' end
local ours = {
  ['x-outcome-kind'] = true, ['x-outcome-message'] = true, ['x-outcome-time'] = true,
  ['x-deliveries'] = true, ['x-original-destination'] = true, ['x-entry-id'] = true,
}
local found = entry()
-- Lua hands over less than 8 000 arguments at once. The client copies this one within the lease.
if found and #found[2] > 6000 then
  redis.call('XCLAIM', stream, group, consumer, 0, id, 'JUSTID')
  return 'large'
end
if found then
  local fields = {}
  local function add(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  for i = 1, #found[2], 2 do
    if not ours[found[2][i]] then add(found[2][i], found[2][i + 1]) end
  end
  add('x-outcome-kind', ARGV[6])
  if ARGV[7] then add('x-outcome-message', ARGV[7]) end
  add('x-outcome-time', string.format('%.0f', now()))
  add('x-deliveries', count)
  add('x-original-destination', stream)
  add('x-entry-id', id)
  redis.call('XADD', KEYS[3], '*', unpack(fields))
end
done(stream, group, { id }, ARGV[5])
return found and 'settled' or 'gone'
