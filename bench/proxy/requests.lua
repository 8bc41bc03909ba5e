-- 1,024 requests made beforehand, one after the other: each for another key.
local requests, i, n = {}, 0, 1024
init = function(args)
  math.randomseed(42)
  for j = 1, n do
    local key = string.format("%08x%04x", math.random(0, 2^31 - 1), j)
    requests[j] = wrk.format("GET", "/k/" .. key .. "/items/42?x=1", {
      ["Host"] = "shop.example.com", ["User-Agent"] = "Mozilla/5.0 (X11; Linux x86_64)", ["Accept"] = "*/*",
      ["Cookie"] = "shop_id=" .. j .. "; session=abcdef0123456789" })
  end
end
request = function() i = i % n + 1; return requests[i] end
done = function(s, l, r)
  local e = s.errors
  io.write(string.format("RESULT requests=%d failed=%d\n", s.requests, e.connect + e.read + e.write + e.status + e.timeout))
end
