-- reserve: blocks to the end of a table: published ones shared, then free or cached ones as fresh blocks.
-- Invariant: a shared block holds the hash that the owner saw; a fresh one is nobody's and leaves the index.
-- rows: seq (8 bytes), shared (u32), fresh (u32), then per shared block_id (u32) and hash, then fresh ids (u32)
local function reserve(rows)
  local at = 1
  while at <= #rows do
    local seq = string.sub(rows, at, at + 7)
    local shared, fresh = struct.unpack('<I4I4', rows, at + 8)
    at = at + 16
    local list = {table_of(seq)}
    for _ = 1, shared do
      local id = struct.unpack('<I4', rows, at)
      local b = block(id)
      if b[2] == NO_HASH or b[2] ~= string.sub(rows, at + 4, at + 19) then
        return refuse('block ' .. id .. ' does not hold the shared hash')
      end
      b[1] = b[1] + 1
      list[#list + 1] = string.sub(rows, at, at + 3)
      at = at + 20
    end
    for i = at, at + 4 * fresh - 4, 4 do
      take_free((struct.unpack('<I4', rows, i)))
    end
    list[#list + 1] = string.sub(rows, at, at + 4 * fresh - 1)
    at = at + 4 * fresh
    tables[seq] = table.concat(list)
  end
end
