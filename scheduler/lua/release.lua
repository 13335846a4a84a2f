-- release: a sequence's whole table. Invariant: a block without references is cached if published, else free.
-- rows: seq (8 bytes)
local function release(rows)
  for at = 1, #rows, 8 do
    local seq = string.sub(rows, at, at + 7)
    local list = table_of(seq)
    if list == '' then return refuse('release of a sequence without blocks') end
    for i = 1, #list, 4 do
      drop_reference((struct.unpack('<I4', list, i)))
    end
    tables[seq] = ''
    later('HDEL', KEYS[6], seq)
  end
end
