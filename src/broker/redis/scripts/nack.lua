-- ARGV[5]: FAIL, which leaves the count as it is, or SILENT, which takes this delivery back.
if not is_owned() then return 'lost' end
if not entry() then
  redis.call('XACK', stream, group, id)
  return 'gone'
end
redis.call('XNACK', stream, group, ARGV[5], 'IDS', 1, id)
return 'settled'
