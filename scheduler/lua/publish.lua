-- publish: a filled block's hash into the index. Invariant: only referenced blocks, one block per hash.
-- rows: block_id (u32), hash (16 bytes)
local function publish(rows)
  for at = 1, #rows, 20 do
    local id, hash = struct.unpack('<I4', rows, at), string.sub(rows, at + 4, at + 19)
    local b = block(id)
    if hash == NO_HASH then return refuse('publish of block ' .. id .. ' without a hash') end
    if b[1] == 0 then return refuse('publish of block ' .. id .. ', which nobody references') end
    if b[2] ~= NO_HASH then return refuse('publish of block ' .. id .. ', which has a hash') end
    if indexed(hash) then return refuse('publish of a hash that block ' .. indexed(hash) .. ' has') end
    b[2] = hash
    index[hash] = id
  end
end
