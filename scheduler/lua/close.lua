-- close: an ended sequence's row goes; its log expires. Invariant: it holds no blocks.
-- rows: seq (8 bytes), log's place in KEYS (u32)
local function close(rows)
  for at = 1, #rows, 12 do
    local seq, key = string.sub(rows, at, at + 7), struct.unpack('<I4', rows, at + 8)
    if table_of(seq) ~= '' then return refuse('close of a sequence that has blocks') end
    later('HDEL', KEYS[5], seq)
    later('HDEL', KEYS[6], seq)
    later('EXPIRE', KEYS[key], ARGV[4])
  end
end
