-- The last of KEYS: the dead letters or the suspects. ARGV[5]: the command that deletes the entry, or an empty text;
-- ARGV[6]: the kind; ARGV[7]: 1 for a suspect; ARGV[8]: the message, if there is one.
if not is_owned() then return 'lost' end
local ours = {
  ['x-outcome-kind'] = true, ['x-outcome-message'] = true, ['x-outcome-time'] = true,
  ['x-deliveries'] = true, ['x-original-destination'] = true, ['x-entry-id'] = true,
  ['x-suspect-of'] = true,
}
local is_suspect = ARGV[7] == '1'
local found = entry()
-- Lua hands over less than 8 000 arguments at once. The client copies this one within the lease.
if found and #found[2] > 6000 then
  redis.call('XCLAIM', stream, group, consumer, 0, id, 'JUSTID')
  return 'large'
end
if found then
  -- A dead letter of a suspect belongs to the stream that it came from first.
  local destination = stream
  local fields = {}
  local function add(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  for i = 1, #found[2], 2 do
    local name, value = found[2][i], found[2][i + 1]
    if not ours[name] then add(name, value) end
    if name == 'x-suspect-of' and not is_suspect then destination = value end
  end
  add('x-outcome-kind', ARGV[6])
  if ARGV[8] then add('x-outcome-message', ARGV[8]) end
  add('x-outcome-time', string.format('%.0f', now()))
  add('x-deliveries', count)
  add('x-original-destination', destination)
  add('x-entry-id', id)
  if is_suspect then add('x-suspect-of', stream) end
  redis.call('XADD', KEYS[#KEYS], '*', unpack(fields))
end
done(stream, group, { id }, ARGV[5])
return found and 'settled' or 'gone'
