-- copied: copies whose result is committed. Invariant: a copy holds its source and its destination until then.
-- rows: destination block_id (u32)
local function copied(rows)
  for at = 1, #rows, 4 do
    local destination = struct.unpack('<I4', rows, at)
    if not is_copying(destination) then return refuse('block ' .. destination .. ' has no copy running') end
    drop_reference((struct.unpack('<I4', redis.call('HGET', KEYS[7], destination))))
    drop_reference(destination)
    copying[destination] = false
    later('HDEL', KEYS[7], destination)
  end
end
