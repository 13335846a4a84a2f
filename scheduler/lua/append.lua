-- append: tokens to the logs. Invariant: write-once per index and contiguous.
-- rows: log's place in KEYS (u32), offset in tokens (u32), count (u32), count ids (u32)
local function append(rows)
  local at = 1
  while at <= #rows do
    local key, offset, count, first = struct.unpack('<I4I4I4', rows, at)
    at = first + 4 * count
    local length = redis.call('STRLEN', KEYS[key])
    if length ~= 4 * offset then
      return refuse('append at ' .. offset .. ' of a log of ' .. length / 4 .. ' tokens')
    end
    later('APPEND', KEYS[key], string.sub(rows, first, at - 1))
  end
end
