if not is_owned() then return 'lost' end
-- JUSTID: the entry's idle time starts anew, its count stays.
redis.call('XCLAIM', stream, group, consumer, 0, id, 'JUSTID')
return 'settled'
