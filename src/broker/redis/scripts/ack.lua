-- ARGV[5]: whether to delete the entry.
if not is_owned() then return 'lost' end
redis.call('XACK', stream, group, id)
if ARGV[5] == '1' then redis.call('XDEL', stream, id) end
return 'settled'
