-- swap_out: a copy of a published block into the host pool begins, beside the steps.
-- Invariant: source and destination are held, and the copy recorded, until it is done, so that a new owner may issue all
-- recorded copies again; what the host block held before is gone.
-- rows: source block_id (u32), its hash, destination host block_id (u32)
local function swap_out(rows)
  for at = 1, #rows, 24 do
    local source, hash = struct.unpack('<I4', rows, at), string.sub(rows, at + 4, at + 19)
    local destination = struct.unpack('<I4', rows, at + 20)
    local b, h = block(source), host_block(destination)
    if hash == NO_HASH or b[2] ~= hash then return refuse('block ' .. source .. ' does not hold what is to go out') end
    if h[1] ~= 0 then return refuse('host block ' .. destination .. ' is held, not free or cached') end
    b[1] = b[1] + 1
    h[1], h[2] = 1, NO_HASH
    swap_outs[destination] = source
    later('HSET', KEYS[9], destination, struct.pack('<I4', source))
  end
end
