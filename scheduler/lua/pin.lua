-- pin: what a table is that no sequence runs: until when it holds its blocks, and for which request. Opaque here.
-- Invariant: there is a pin as long as there is its table.
-- rows: its name (8 bytes), length (u32), packed pin (empty: it goes)
local function pin(rows)
  local at = 1
  while at <= #rows do
    local name, length = string.sub(rows, at, at + 7), struct.unpack('<I4', rows, at + 8)
    if (length > 0) ~= (table_of(name) ~= '') then return refuse('pin of a table that does not match') end
    if length > 0 then
      later('HSET', KEYS[11], name, string.sub(rows, at + 12, at + 11 + length))
    else
      later('HDEL', KEYS[11], name)
    end
    at = at + 12 + length
  end
end
