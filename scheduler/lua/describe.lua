-- describe: what a sequence is: its request, choice, attempt, losses, first index of its log. Opaque here.
-- rows: seq (8 bytes), length (u32), packed row
local function describe(rows)
  local at = 1
  while at <= #rows do
    local seq, length = string.sub(rows, at, at + 7), struct.unpack('<I4', rows, at + 8)
    later('HSET', KEYS[5], seq, string.sub(rows, at + 12, at + 11 + length))
    at = at + 12 + length
  end
end
