-- swapped_in: copies out of the host pool that are done: nothing is held by them any more.
-- rows: destination block_id (u32)
local function swapped_in(rows)
  for at = 1, #rows, 4 do
    local destination = struct.unpack('<I4', rows, at)
    local source = source_of_swap(KEYS[10], swap_ins, destination)
    if not source then return refuse('nothing is on its way into block ' .. destination) end
    local h = host_block(source)
    h[1] = h[1] - 1
    drop_reference(destination)
    swap_ins[destination] = false
    later('HDEL', KEYS[10], destination)
  end
end
