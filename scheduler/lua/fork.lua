-- fork: a child shares the first blocks of its parent's table, and gets a copy of the partial one.
-- Invariant: shared blocks gain a reference; a copy's source and destination are held, and the copy recorded, until it
-- is done, so that a new owner may issue all recorded copies again, in any order.
-- rows: parent (8 bytes), child (8 bytes), blocks shared (u32), copy source, destination, tokens (u32; 0: no copy)
local function fork(rows)
  for at = 1, #rows, 32 do
    local parent, child = string.sub(rows, at, at + 7), string.sub(rows, at + 8, at + 15)
    local shared, source, destination, tokens = struct.unpack('<I4I4I4I4', rows, at + 16)
    local prefix = string.sub(table_of(parent), 1, 4 * shared)
    if #prefix < 4 * shared then return refuse('fork of ' .. shared .. ' blocks from a shorter table') end
    if table_of(child) ~= '' then return refuse('fork into a sequence that has blocks') end
    for i = 1, #prefix, 4 do
      local b = block((struct.unpack('<I4', prefix, i)))
      b[1] = b[1] + 1
    end
    if destination ~= 0 then
      local b = block(source)
      if b[1] == 0 then return refuse('copy of block ' .. source .. ', which nobody references') end
      if is_copying(source) then return refuse('copy of block ' .. source .. ' before its own copy is done') end
      b[1] = b[1] + 1
      take_free(destination)
      block(destination)[1] = 2
      copying[destination] = true
      later('HSET', KEYS[7], destination, struct.pack('<I4I4', source, tokens))
      prefix = prefix .. struct.pack('<I4', destination)
    end
    tables[child] = prefix
  end
end
