-- swap_in: a copy of a host block into a block that is reserved and holds nothing yet begins, beside the steps.
-- Invariant: as swap_out.
-- rows: source host block_id (u32), its hash, destination block_id (u32)
local function swap_in(rows)
  for at = 1, #rows, 24 do
    local source, hash = struct.unpack('<I4', rows, at), string.sub(rows, at + 4, at + 19)
    local destination = struct.unpack('<I4', rows, at + 20)
    local h, b = host_block(source), block(destination)
    if hash == NO_HASH or h[2] ~= hash then return refuse('host block ' .. source .. ' does not hold the shared hash') end
    if b[1] == 0 or b[2] ~= NO_HASH then return refuse('block ' .. destination .. ' is not reserved and empty') end
    if source_of_swap(KEYS[10], swap_ins, destination) then
      return refuse('something is on its way into block ' .. destination)
    end
    h[1] = h[1] + 1
    b[1] = b[1] + 1
    swap_ins[destination] = source
    later('HSET', KEYS[10], destination, struct.pack('<I4', source))
  end
end
