//! Steps of a table's life, as a copier and a conductor take them, by plain SQL where the program would copy.

use sitepair::applier::{self, OnMisfit, Unknown};
use sitepair::model::{Lsn, TableName, Track};
use sitepair::postgres::table_state;

use super::Pair;
use super::pair::until_free;
use crate::support::try_psql;

pub fn table(name: &str) -> TableName {
    TableName::new("public", name)
}

impl Pair {
    /// As under a conductor: new tables are copied, those that do not fit pause.
    pub fn conducted(&mut self) {
        (self.unknown, self.misfit) = (Unknown::Copy, OnMisfit::Pause);
    }

    /// These tables need no copy.
    pub async fn join_at_once(&self, tables: &[&str]) {
        let tables: Vec<_> = tables.iter().map(|name| table(name)).collect();
        table_state::joined(&self.at_target().await.client, &self.flow, &tables).await.unwrap();
    }

    /// `name=state@next` of all tables, by name.
    pub fn states(&self) -> String {
        let state = "table_name || '=' || state || coalesce('@' || next_offset, '')";
        self.target.sql(&format!("select string_agg({state}, ' ' order by table_name) from sitepair.table_state"))
    }

    /// Copies a table that is copying: all its rows as the source has them now.
    pub async fn copy(&self, name: &str) {
        let columns = "select string_agg(quote_ident(attname), ', ' order by attnum) from pg_attribute \
                       where attrelid = $1::regclass and attnum > 0 and not attisdropped and attgenerated = ''";
        let columns = self.source.sql(&columns.replace("$1", &format!("'{name}'")));
        let rows = self.source.sql(&format!("copy (select {columns} from {name}) to stdout"));
        let horizon: Lsn = self.source.sql("select pg_current_wal_insert_lsn()").parse().unwrap();
        let rows = if rows.is_empty() { rows } else { format!("{rows}\n") };
        let script = format!(
            "begin; set local session_replication_role = replica; delete from {name}; copy {name} ({columns}) from stdin;\n\
             {rows}\\.\ncommit;"
        );
        try_psql(self.target.cluster, &self.target.name, &script).unwrap();
        table_state::copied(&self.at_target().await.client, &self.flow, &table(name), horizon).await.unwrap();
    }

    /// Joins all tables that are ready; gives their names.
    pub async fn join(&self) -> Vec<String> {
        let session = self.at_target().await;
        if applier::begin_joining(&session, &self.flow).await.unwrap().is_none() {
            return Vec::new();
        }
        self.catch_up().await
    }

    /// Runs the joining track to the main one's place and ends it.
    pub async fn catch_up(&self) -> Vec<String> {
        let goal = self.checkpoint().await.next;
        self.try_track(Track::Joining, goal).await.unwrap_or_else(|fault| panic!("{fault}"));
        let session = self.at_target().await;
        let joined = until_free(async || applier::join(&session, &self.flow).await).await;
        let joined = joined.unwrap_or_else(|fault| panic!("{fault}"));
        joined.into_iter().flatten().map(|table| table.name).collect()
    }
}
