-- copied: copies whose result is committed. Invariant: a copy holds its source until then.
-- rows: destination block_id (u32)
local function copied(rows)
  for at = 1, #rows, 4 do
    local destination = struct.unpack('<I4', rows, at)
    local copy = redis.call('HGET', KEYS[7], destination)
    if not copy then return refuse('block ' .. destination .. ' has no copy running') end
    drop_reference((struct.unpack('<I4', copy)))
    later('HDEL', KEYS[7], destination)
  end
end
