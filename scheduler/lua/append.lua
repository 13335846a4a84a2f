-- append: entries to the logs: token ids, or words of a search or a ranked choice. Invariant: write-once per index and contiguous.
-- rows: log's place in KEYS (u32), offset in entries (u32), count (u32), count entries (u32)
local log_keys, log_tokens = {}, {}
local log_lengths = {}         -- key -> bytes, as it will be: a script may hold the tokens of several steps

local function append(rows)
  local unpack, sub, call = struct.unpack, string.sub, redis.call
  local at, size, count_of_logs = 1, #rows, 0
  while at <= size do
    local place, offset, count, first = unpack('<I4I4I4', rows, at)
    at = first + 4 * count
    local key = KEYS[place]
    local length = log_lengths[key] or call('STRLEN', key)
    if length ~= 4 * offset then
      return refuse('append at ' .. offset .. ' of a log of ' .. length / 4 .. ' tokens')
    end
    log_lengths[key] = length + 4 * count
    count_of_logs = count_of_logs + 1
    log_keys[count_of_logs] = key
    log_tokens[count_of_logs] = sub(rows, first, at - 1)
  end
end

local function write_logs()
  local call = redis.call
  for i = 1, #log_keys do call('APPEND', log_keys[i], log_tokens[i]) end
end
