"""Reads a whole Kafka topic and checks each record against the published schema.

usage: consumer.py BROKERS TOPIC SCHEMA; prints `records transactions rows`, the ids of inserted rows of
public.account, and what kinds of records and changes there were.
"""

import json
import sys

from confluent_kafka import Consumer, TopicPartition, OFFSET_BEGINNING
from jsonschema import Draft202012Validator

brokers, topic, schema = sys.argv[1:]
validator = Draft202012Validator(json.load(open(schema)))
consumer = Consumer({
    "bootstrap.servers": brokers,
    "group.id": "python",
    "isolation.level": "read_committed",
    "enable.partition.eof": True,
    "enable.auto.commit": False,
})
consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
records = transactions = rows = 0
ids = []
kinds = set()
while True:
    message = consumer.poll(30)
    if message is None:
        sys.exit("no record within 30 s")
    if message.error():
        break
    headers = {name: value.decode() for name, value in message.headers()}
    assert headers["schema"] == "sitepair.record.1", headers
    assert int(headers["offset"]) == records, (headers, records)
    record = json.loads(message.value())
    validator.validate(record)
    assert headers["flow_id"] == record["flow_id"], headers
    if headers["kind"] == "last":
        assert headers["end_lsn"] == record["end_lsn"] and int(headers["xid"]) == record["xid"], headers
        transactions += 1
    rows += int(headers["rows"])
    records += 1
    kinds.add(record["kind"])
    kinds.update(name for name in ("genesis", "cont", "cont_end") if name in record)
    if "copy" in record:
        kinds.add("copy:" + record["copy"]["step"])
    for change in record.get("changes", []):
        kinds.add(change["op"])
        if change["op"] == "i":
            ids.append(change["new"][0])
print(records, transactions, rows)
print(" ".join(ids))
print(" ".join(sorted(kinds)))
