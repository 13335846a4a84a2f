-- prelude: the working copy that the verbs change, behind the fence. Nothing is written before every verb has agreed.
-- KEYS  1 meta (hash), 2 pool (string), 3 index (hash), 4 tables (hash), 5 seqs (hash), 6 computed (hash),
--       7 copies (hash), 8 host (string), 9 swap_outs (hash), 10 swap_ins (hash), 11 pins (hash),
--       12.. logs of the sequences that are appended to or closed
-- ARGV  1 epoch, 2 n, 3 committed step_id, 4 seconds that a closed log is kept, 5.. one packed string per verb,
--       in the order of finish.lua
-- returns "ok", and what the fence answers; error: REFUSED (a block or sequence is not in the expected state)
-- pool, host: per block id 20 bytes: ref_count (u32), block_hash (16 bytes, zeros: none). Integers are little-endian.
local BLOCK_BYTES = 20
local NO_HASH = string.rep('\0', 16)

local refusal = nil            -- the first verb that disagrees says why
local index = {}               -- hash -> block_id, or false where it goes
local tables = {}              -- seq -> packed block ids, as it will be
local copying = {}             -- block_id -> whether a copy into it runs, as it will be
local swap_outs = {}           -- host block_id -> block_id that is copied into it, or false
local swap_ins = {}            -- block_id -> host block_id that is copied into it, or false
local writes = {}              -- commands to run at the end, in order

local function refuse(reason)
  refusal = refusal or reason
end

local function later(...)
  writes[#writes + 1] = {...}
end

-- Of one pool: how to look a block up, and block_id -> {ref_count, hash} of those looked up, as they will be.
local function open_pool(key, noun)
  local blocks = {}
  local function block(id)
    local known = blocks[id]
    if known then return known end
    local row = redis.call('GETRANGE', key, id * BLOCK_BYTES, id * BLOCK_BYTES + BLOCK_BYTES - 1)
    if #row < BLOCK_BYTES or id == 0 then
      refuse(noun .. ' ' .. id .. ' is not in the pool')
      row = string.rep('\0', BLOCK_BYTES)
    end
    known = {(struct.unpack('<I4', row)), string.sub(row, 5)}
    blocks[id] = known
    return known
  end
  return block, blocks
end

local block, blocks = open_pool(KEYS[2], 'block')
local host_block, host_blocks = open_pool(KEYS[8], 'host block')

local function indexed(hash)
  if index[hash] == nil then
    index[hash] = tonumber(redis.call('HGET', KEYS[3], hash) or '') or false
  end
  return index[hash]
end

local function table_of(seq)
  if tables[seq] == nil then
    tables[seq] = redis.call('HGET', KEYS[4], seq) or ''
  end
  return tables[seq]
end

local function is_copying(id)
  if copying[id] == nil then
    copying[id] = redis.call('HEXISTS', KEYS[7], id) == 1
  end
  return copying[id]
end

-- Swaps under way are recorded by destination, beside their source: `swaps` holds what this script knows of one record.
local function source_of_swap(key, swaps, destination)
  if swaps[destination] == nil then
    local row = redis.call('HGET', key, destination)
    swaps[destination] = row and (struct.unpack('<I4', row)) or false
  end
  return swaps[destination]
end

local function drop_reference(id)
  local b = block(id)
  if b[1] == 0 then return refuse('block ' .. id .. ' has no reference to drop') end
  b[1] = b[1] - 1
end

local function take_free(id)
  local b = block(id)
  if b[1] ~= 0 then return refuse('block ' .. id .. ' is referenced, not free or cached') end
  if b[2] ~= NO_HASH then
    index[b[2]] = false
    b[2] = NO_HASH
  end
  b[1] = 1
end
