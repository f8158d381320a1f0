//! Two databases, a publication, and tables that are to be copied.

use std::time::Duration;

use sitepair::config::{ColumnRule, ConnInfo, Rule, TruncatePolicy, conninfo};
use sitepair::model::{FlowName, Result};
use sitepair::postgres::{catalog, session};
use sitepair::rules;
use sitepair::snapshot::{self, CopyParts, CopyState};
use tokio::sync::watch;

use crate::support::{self, Database};

const TARGET_SQL: &str = include_str!("../../../sql/20_target.sql");

/// The oldest and the newest version.
pub fn versions() -> Vec<u32> {
    let all = support::versions();
    let ends = [all.first(), all.last()];
    let mut ends: Vec<u32> = ends.into_iter().flatten().map(|(version, _)| *version).collect();
    ends.dedup();
    ends
}

pub struct Pair {
    pub source: Database,
    pub target: Database,
    pub flow: FlowName,
    pub rules: Vec<Rule>,
    pub workers: usize,
    pub max_rate: Option<u64>,
}

pub fn rule(include: &str) -> Rule {
    Rule {
        include: vec![include.to_owned()],
        exclude: Vec::new(),
        columns: ColumnRule::All,
        filter: None,
        truncate: TruncatePolicy::Apply,
        lane: None,
        place: "p.toml:7".into(),
    }
}

pub fn info(database: &Database) -> ConnInfo {
    conninfo::parse(&database.conninfo()).unwrap()
}

impl Pair {
    pub fn new(version: u32, at_source: &str, at_target: &str) -> Pair {
        Self::of(support::database(version, 0), support::database(version, 1), at_source, at_target)
    }

    pub fn of(source: Database, target: Database, at_source: &str, at_target: &str) -> Pair {
        let flow = FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to: "b".into(), shared: false };
        source.sql(at_source);
        source.sql(&format!(
            "create publication {} for all tables with (publish_via_partition_root = true)",
            flow.object()
        ));
        target.sql(at_target);
        target.sql(TARGET_SQL);
        Pair { source, target, flow, rules: vec![rule("*.*")], workers: 3, max_rate: None }
    }

    pub fn filtered(mut self, filter: &str) -> Pair {
        self.rules[0].filter = Some(filter.to_owned());
        self
    }

    /// All tables of the source that the rules select are to be copied, from offset 5 on.
    pub fn begin(&self) {
        self.target.sql(&format!(
            "insert into sitepair.table_state (flow, table_schema, table_name, state, next_offset, end_lsn) \
             select '{}', s, t, 'copying', 5, '0/5' from unnest(array[{}], array[{}]) as u (s, t)",
            self.flow,
            self.tables().iter().map(|(schema, _)| format!("'{schema}'")).collect::<Vec<_>>().join(","),
            self.tables().iter().map(|(_, name)| format!("'{name}'")).collect::<Vec<_>>().join(","),
        ));
    }

    fn tables(&self) -> Vec<(String, String)> {
        let listed = self.source.sql(
            "select n.nspname || '|' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace \
             where relkind in ('r', 'p') and not relispartition and nspname !~ '^pg_|^information_schema$' order by 1",
        );
        listed.lines().filter_map(|line| line.split_once('|')).map(|(s, t)| (s.to_owned(), t.to_owned())).collect()
    }

    pub async fn parts(&self) -> CopyParts {
        let session = session::connect(&info(&self.source), "test").await.unwrap();
        let tables = catalog::tables(&session).await.unwrap();
        let selected = rules::select(&self.rules, &tables);
        CopyParts {
            source: info(&self.source),
            target: info(&self.target),
            flow: self.flow.clone(),
            selected: selected.map_err(|problems| format!("{problems:?}")).unwrap(),
            workers: self.workers,
            max_rate: self.max_rate,
            application: "sitepair copier".into(),
        }
    }

    /// Runs the copier to its end.
    pub async fn try_copy(&self) -> Result<CopyState> {
        let (sender, receiver) = watch::channel(CopyState::default());
        let (_stopper, stop) = watch::channel(false);
        let run = snapshot::run(self.parts().await, stop, sender);
        tokio::time::timeout(Duration::from_secs(120), run).await.expect("the copy ends")?;
        Ok(*receiver.borrow())
    }

    pub async fn copy(&self) -> CopyState {
        let state = self.try_copy().await.unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(self.target.sql("select count(*) from sitepair.table_state where state <> 'copied'"), "0");
        assert_eq!(self.target.sql("select count(*) from sitepair.copy_part"), "0");
        assert_eq!((state.tables, state.tables_waiting), (state.tables_copied, 0));
        state
    }

    /// Every table, column by column, by plain SQL; a row filter holds at the source.
    pub fn assert_equal(&self) {
        let filter = self.rules[0].filter.as_deref().unwrap_or("true");
        for (schema, name) in self.tables() {
            let digest = |filter: &str| {
                format!(
                    "set bytea_output = hex; set extra_float_digits = 3; select count(*), \
                     md5(coalesce(string_agg(md5(t::text), '' order by md5(t::text)), '')) from \"{schema}\".\"{}\" t where {filter}",
                    name.replace('"', "\"\"")
                )
            };
            let (source, target) = (self.source.sql(&digest(filter)), self.target.sql(&digest("true")));
            assert_eq!(source, target, "{schema}.{name}");
        }
    }

    /// The detail of the event that a table was copied.
    pub fn copied(&self, table: &str, field: &str) -> i64 {
        let sql = format!(
            "select detail->>'{field}' from sitepair.journal_event where what = 'copied' and table_name = '{table}' order by id desc limit 1"
        );
        self.target.sql(&sql).parse().expect("a number")
    }
}
