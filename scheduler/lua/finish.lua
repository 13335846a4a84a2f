-- finish: runs the verbs on the working copy; if none refused, writes everything and counts the script as n.
append(ARGV[5])
publish(ARGV[6])
copied(ARGV[7])
swapped_out(ARGV[8])
swapped_in(ARGV[9])
release(ARGV[10])
fork(ARGV[11])
describe(ARGV[12])
computed(ARGV[13])
reserve(ARGV[14])
swap_out(ARGV[15])
swap_in(ARGV[16])
pin(ARGV[17])
close(ARGV[18])
forget(ARGV[19])
if refusal then return redis.error_reply('REFUSED ' .. refusal) end

write_logs()
for _, command in ipairs(writes) do redis.call(unpack(command)) end
local function write_pool(key, changed)
  for id, b in pairs(changed) do
    redis.call('SETRANGE', key, id * BLOCK_BYTES, struct.pack('<I4', b[1]) .. b[2])
  end
end
write_pool(KEYS[2], blocks)
write_pool(KEYS[8], host_blocks)
for hash, id in pairs(index) do
  if id then redis.call('HSET', KEYS[3], hash, id) else redis.call('HDEL', KEYS[3], hash) end
end
for seq, list in pairs(tables) do
  if list == '' then redis.call('HDEL', KEYS[4], seq) else redis.call('HSET', KEYS[4], seq, list) end
end
redis.call('HSET', KEYS[1], 'n', ARGV[2], 'committed_step_id', ARGV[3])
return 'ok'
