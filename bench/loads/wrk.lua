-- The figures of a run as one line of JSON, below what wrk prints for people. Times are in microseconds.
done = function(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '{"requests": %d, "bytes": %d, "microseconds": %d, "p50": %d, "p99": %d, "p999": %d, "errors": %d}\n',
      summary.requests, summary.bytes, summary.duration,
      latency:percentile(50), latency:percentile(99), latency:percentile(99.9),
      errors.connect + errors.read + errors.write + errors.timeout + errors.status))
end
