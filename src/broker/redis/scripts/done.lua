-- Acks entries, and deletes them by the given command, if there is one.
local function done(stream, group, ids, delete)
  if delete == 'XACKDEL' then
    -- ACKED: once all groups have acked it. One by one, since 8.2 before 8.2.3 writes past the end of a
    -- buffer when it gets many.
    for _, id in ipairs(ids) do redis.call('XACKDEL', stream, group, 'ACKED', 'IDS', 1, id) end
    return
  end
  redis.call('XACK', stream, group, unpack(ids))
  if delete == 'XDEL' then redis.call('XDEL', stream, unpack(ids)) end
end

