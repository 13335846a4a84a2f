-- forget: a sequence that lives on under another worker's tag. Invariant: it holds no blocks; its log stays.
-- rows: seq (8 bytes)
local function forget(rows)
  for at = 1, #rows, 8 do
    local seq = string.sub(rows, at, at + 7)
    if table_of(seq) ~= '' then return refuse('forget of a sequence that has blocks') end
    later('HDEL', KEYS[5], seq)
    later('HDEL', KEYS[6], seq)
  end
end
