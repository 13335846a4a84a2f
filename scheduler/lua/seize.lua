-- seize: a new owner raises the worker's epoch. Repeating it raises it again, which is safe.
-- KEYS  1 meta (hash)
-- ARGV  1 highest epoch that the worker has seen
-- returns the meta hash, flat. Invariant: the epoch only grows, above all that Redis or the worker has seen.
local epoch = math.max(tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0'), tonumber(ARGV[1])) + 1
redis.call('HSET', KEYS[1], 'epoch', string.format('%d', epoch))
return redis.call('HGETALL', KEYS[1])
