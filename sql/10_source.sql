-- A source: who its flows are (one row for each). Flows that share a topic have one slot and one identity.
--
-- A row without start_lsn is a deploy that did not finish: its slot, if there is one, was read by nobody, and the next
-- deploy makes it anew.

CREATE TABLE IF NOT EXISTS sitepair.flow (
    flow          text PRIMARY KEY,
    flow_id       uuid NOT NULL,
    pipeline      text NOT NULL,
    lane          text,
    from_site     text NOT NULL,
    to_site       text NOT NULL,
    start_lsn     pg_lsn,
    system_id     numeric(20) NOT NULL,
    timeline      bigint NOT NULL,
    slot          text NOT NULL,
    database      text NOT NULL,
    database_oid  oid NOT NULL,
    filters       jsonb NOT NULL DEFAULT '{}',
    entering      text[] NOT NULL DEFAULT '{}',
    entering_xmax xid8,
    created_at    timestamptz NOT NULL DEFAULT now()
);

ALTER TABLE sitepair.flow ADD COLUMN IF NOT EXISTS slot_dropped jsonb;
ALTER TABLE sitepair.flow DROP CONSTRAINT IF EXISTS flow_flow_id_key;

COMMENT ON TABLE sitepair.flow IS 'identity of each flow that starts here';
COMMENT ON COLUMN sitepair.flow.flow_id IS 'made at deploy; every record and checkpoint of the flow carries it';
COMMENT ON COLUMN sitepair.flow.start_lsn IS 'the slot''s consistent point, where the topic opens; null while a deploy is unfinished';
COMMENT ON COLUMN sitepair.flow.system_id IS 'system identifier of the cluster that made the slot';
COMMENT ON COLUMN sitepair.flow.filters IS 'row filter of each table that has one, as the last deploy found it: {"schema.table": "SQL"}';
COMMENT ON COLUMN sitepair.flow.entering IS 'tables that were added to the publication later and that the target has not taken up yet, to copy them';
COMMENT ON COLUMN sitepair.flow.entering_xmax IS 'a transaction id that was not in use yet once the publication had the last table that was added; null beside entering: not noted yet';
COMMENT ON COLUMN sitepair.flow.slot_dropped IS 'null, or: the daemon dropped the slot as the pipeline file asks for ([wal] on_limit), when, and what it held back';

-- Copies that travel through the topic ([copy] through = "topic"), one row for each table.
CREATE TABLE IF NOT EXISTS sitepair.topic_copy (
    flow_id      uuid NOT NULL,
    table_schema text NOT NULL,
    table_name   text NOT NULL,
    copy_id      uuid NOT NULL,
    cursor       jsonb,
    rows         bigint NOT NULL DEFAULT 0,
    begun        boolean NOT NULL DEFAULT false,
    ended        boolean NOT NULL DEFAULT false,
    settled      boolean NOT NULL DEFAULT false,
    begun_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (flow_id, table_schema, table_name)
);

COMMENT ON TABLE sitepair.topic_copy IS 'how far the reader''s node is with copies that travel through the topic';
COMMENT ON COLUMN sitepair.topic_copy.copy_id IS 'names the copy in the log and in the topic; a message of the log without it is not the copier''s';
COMMENT ON COLUMN sitepair.topic_copy.cursor IS 'key of the last row that is in the log; moves in the transaction that writes the chunk there';
COMMENT ON COLUMN sitepair.topic_copy.begun IS 'the first step is in the log; the row was committed before, so that a reader that meets the step sees the row';
COMMENT ON COLUMN sitepair.topic_copy.ended IS 'the last step is in the log';
COMMENT ON COLUMN sitepair.topic_copy.settled IS 'updates need not carry all values any more because of it';
