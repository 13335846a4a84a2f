-- finish: runs the verbs on the working copy; if none refused, writes everything and counts the script as n.
append(ARGV[5])
computed(ARGV[6])
publish(ARGV[7])
copied(ARGV[8])
release(ARGV[9])
fork(ARGV[10])
describe(ARGV[11])
reserve(ARGV[12])
close(ARGV[13])
forget(ARGV[14])
if refusal then return redis.error_reply('REFUSED ' .. refusal) end

write_logs()
for _, command in ipairs(writes) do redis.call(unpack(command)) end
for id, b in pairs(blocks) do
  redis.call('SETRANGE', KEYS[2], id * BLOCK_BYTES, struct.pack('<I4', b[1]) .. b[2])
end
for hash, id in pairs(index) do
  if id then redis.call('HSET', KEYS[3], hash, id) else redis.call('HDEL', KEYS[3], hash) end
end
for seq, list in pairs(tables) do
  if list == '' then redis.call('HDEL', KEYS[4], seq) else redis.call('HSET', KEYS[4], seq, list) end
end
redis.call('HSET', KEYS[1], 'n', ARGV[2], 'committed_step_id', ARGV[3])
return 'ok'
