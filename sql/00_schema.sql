-- Every site: the schema that holds whatever sitepair keeps, and what was installed in it.

CREATE SCHEMA IF NOT EXISTS sitepair;

COMMENT ON SCHEMA sitepair IS 'state of sitepair; remove it with "sitepair undeploy"';

CREATE TABLE IF NOT EXISTS sitepair.installed (
    file         text PRIMARY KEY,
    digest       text NOT NULL,
    installed_at timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE sitepair.installed IS 'SQL files that were run here, with the SHA-256 of each';
