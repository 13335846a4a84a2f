-- swapped_out: copies into the host pool that are done: the host block holds from now on what its source does.
-- rows: destination host block_id (u32)
local function swapped_out(rows)
  for at = 1, #rows, 4 do
    local destination = struct.unpack('<I4', rows, at)
    local source = source_of_swap(KEYS[9], swap_outs, destination)
    if not source then return refuse('nothing is on its way out to host block ' .. destination) end
    local h = host_block(destination)
    h[1], h[2] = h[1] - 1, block(source)[2]
    drop_reference(source)
    swap_outs[destination] = false
    later('HDEL', KEYS[9], destination)
  end
end
