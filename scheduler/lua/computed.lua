-- computed: how far a prompt is, for sequences that have not caught up; absent means caught up.
-- rows: seq (8 bytes), num_computed_tokens (i32; -1: caught up)
local function computed(rows)
  for at = 1, #rows, 12 do
    local seq, tokens = string.sub(rows, at, at + 7), struct.unpack('<i4', rows, at + 8)
    if tokens < 0 then
      later('HDEL', KEYS[6], seq)
    else
      later('HSET', KEYS[6], seq, tokens)
    end
  end
end
