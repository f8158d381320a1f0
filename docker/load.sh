#!/bin/sh
# Ten rows and one update a second, or as often as ROUNDS says; for ever without it.
set -eu
round=0
while [ "${ROUNDS:-0}" -eq 0 ] || [ "$round" -lt "$ROUNDS" ]; do
  round=$((round + 1))
  psql -q -v ON_ERROR_STOP=1 -c "INSERT INTO account (name) SELECT 'round $round' FROM generate_series(1, 10)" \
    -c "UPDATE account SET changed = now() WHERE id % 10 = $round % 10"
  [ "${ROUNDS:-0}" -ne 0 ] || sleep 1
done
