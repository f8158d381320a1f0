//! Undeploy: what goes, what stays and why.
//!
//! Rights that the login was given stay: they may have been there before. `DROP OWNED BY` takes them away.

use tokio_postgres::Client;

use crate::model::names::{quote_ident, quote_literal};
use crate::model::{Code, Fault, FlowName, Result};
use crate::postgres::flow::{self, FlowState};
use crate::postgres::slot as slots;
use crate::postgres::{origin, publication, sqlstate};

use super::finding::{Change, Finding, Findings};
use super::server::Node;
use super::slot;

/// What an undeploy did at one site.
pub(super) struct Removal<'a> {
    node: &'a Node<'a>,
    found: Findings<'a>,
    changes: Vec<Change>,
}

impl<'a> Removal<'a> {
    pub(super) fn at(node: &'a Node<'a>) -> Self {
        Self { node, found: Findings::at(node.name()), changes: Vec::new() }
    }

    pub(super) fn into_parts(self) -> (Vec<Finding>, Vec<Change>) {
        (self.found.into_vec(), self.changes)
    }

    fn did(&mut self, what: impl Into<String>, sql: impl Into<String>) {
        self.changes.push(Change { site: self.node.name().to_owned(), what: what.into(), sql: sql.into() });
    }

    /// Forgets the flow at its target: checkpoint, origin; journal and parked operations only with `history`.
    pub(super) async fn target(&mut self, flow: &FlowName, history: bool) -> Result<()> {
        let client = &self.node.session.client;
        for name in flow.origins() {
            if origin::drop(client, &name).await.map_err(|fault| fault.at(self.node.name()))? {
                let sql = format!("SELECT pg_replication_origin_drop({});", quote_literal(&name));
                self.did(format!("drop replication origin {name}"), sql);
            }
        }
        let mut tables = vec!["checkpoint", "table_state", "copy_part", "displaced", "shadow", "request"];
        if history {
            tables.extend(["journal", "journal_operation", "journal_event", "parked"]);
        }
        for table in tables {
            if table_exists(self.node, table).await? {
                let sql = format!("DELETE FROM sitepair.{table} WHERE flow = {};", quote_literal(&flow.to_string()));
                let deleted = client.execute(sql.as_str(), &[]).await.map_err(|error| self.fault(&error))?;
                if deleted > 0 {
                    self.did(format!("remove {deleted} rows of {flow} from sitepair.{table}"), sql);
                }
            }
        }
        Ok(())
    }

    /// Removes the flow at its source: slot, publication, row.
    pub(super) async fn source(&mut self, flow: &FlowName) -> Result<()> {
        let client = &self.node.session.client;
        let object = flow.object();
        let at = |fault: Fault| fault.at(self.node.name());
        let state = flow::state(client, flow).await.map_err(at)?;
        let others = others(self.node, flow, std::slice::from_ref(flow)).await?;
        if !others.is_empty() {
            let what = format!("stays, with publication and topic: {} read it", list(&others));
            self.found.info(format!("slot {object}"), what, "");
            return self.forget(flow, &state).await;
        }
        if slots::state(client, &object).await.map_err(at)?.is_some() {
            let sql = format!("SELECT pg_drop_replication_slot({});", quote_literal(&object));
            if state == FlowState::Absent {
                let what = "stays: sitepair.flow knows nothing of it, so no deploy made it";
                self.found.warning(format!("slot {object}"), what, format!("{sql} -- if nobody needs it"));
            } else {
                slots::drop(client, &object).await.map_err(at)?;
                self.did(format!("drop slot {object}"), sql);
            }
        }
        if publication::state(client, &object).await.map_err(at)?.is_some() {
            let sql = format!("DROP PUBLICATION {};", quote_ident(&object));
            client.batch_execute(&sql).await.map_err(|error| self.fault(&error))?;
            self.did(format!("drop publication {object}"), sql);
        }
        self.forget(flow, &state).await
    }

    /// Removes the flow's row.
    async fn forget(&mut self, flow: &FlowName, state: &FlowState) -> Result<()> {
        if *state != FlowState::Absent {
            flow::remove(&self.node.session.client, flow).await.map_err(|fault| fault.at(self.node.name()))?;
            let sql = format!("DELETE FROM sitepair.flow WHERE flow = {};", quote_literal(&flow.to_string()));
            self.did(format!("forget flow {flow}"), sql);
        }
        Ok(())
    }

    /// Drops the schema once nothing in it is of use to anybody.
    pub(super) async fn schema(&mut self) -> Result<()> {
        let sql = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'sitepair')";
        let row = self.node.session.query_one(sql, &[]).await.map_err(|error| self.fault(&error))?;
        if !row.get::<_, bool>(0) {
            return Ok(());
        }
        let mut stays = Vec::new();
        for table in ["flow", "checkpoint", "journal", "parked"] {
            let rows = count(self.node, table, None).await?;
            if rows > 0 {
                stays.push(format!("{rows} rows in sitepair.{table}"));
            }
        }
        if stays.is_empty() {
            let sql = "DROP SCHEMA sitepair CASCADE;";
            self.node.session.batch_execute(sql).await.map_err(|error| self.fault(&error))?;
            self.did("drop schema sitepair", sql);
        } else {
            let remedy = "run `sitepair undeploy --yes` to drop the journal and parked operations of this pipeline too";
            self.found.info("schema sitepair", format!("stays: {}", stays.join(", ")), remedy);
        }
        Ok(())
    }

    /// Says that rights stay.
    pub(super) fn rights(&mut self) {
        let login = &self.node.login;
        if login.exists && !login.superuser && !self.changes.is_empty() {
            let remedy = format!(
                "DROP OWNED BY {}; -- in this database, if the role serves nothing else",
                quote_ident(&login.name)
            );
            self.found.info(format!("role {}", login.name), "keeps the rights that it was granted", remedy);
        }
    }

    fn fault(&self, error: &tokio_postgres::Error) -> Fault {
        sqlstate::fault(error).at(self.node.name())
    }
}

/// Flows that read the log of `flow` too, but for those `without`: while there are any, slot, publication and topic stay.
pub(super) async fn others(node: &Node<'_>, flow: &FlowName, without: &[FlowName]) -> Result<Vec<FlowName>> {
    if !flow.shared {
        return Ok(Vec::new());
    }
    let mut all = flow::sharers(&node.session, flow).await.map_err(|fault| fault.at(node.name()))?;
    all.retain(|other| !without.contains(other));
    Ok(all)
}

fn list(flows: &[FlowName]) -> String {
    flows.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Refuses while a reader holds the flow's slot, before anything is touched.
pub(super) async fn check_idle(node: &Node<'_>, flow: &FlowName) -> Result<()> {
    let at = |fault: Fault| fault.at(node.name());
    let Some(state) = slots::state(&node.session, &flow.object()).await.map_err(at)? else { return Ok(()) };
    let Some(pid) = state.active_pid else { return Ok(()) };
    let who = slot::holder(&node.session, pid).await.map_err(at)?;
    Err(Fault::new(Code::SecondReader, format!("slot {} is in use by {who}", state.name))
        .at(node.name())
        .remedy("stop the reader (`sitepair run`), then run `sitepair undeploy` again"))
}

/// Journal rows and parked operations of a flow.
pub(super) async fn history(node: &Node<'_>, flow: &FlowName) -> Result<i64> {
    Ok(count(node, "journal", Some(flow)).await? + count(node, "parked", Some(flow)).await?)
}

async fn count(node: &Node<'_>, table: &str, flow: Option<&FlowName>) -> Result<i64> {
    if !table_exists(node, table).await? {
        return Ok(0);
    }
    let condition = flow.map_or(String::new(), |flow| format!(" WHERE flow = {}", quote_literal(&flow.to_string())));
    let sql = format!("SELECT count(*) FROM sitepair.{table}{condition}");
    let row = node.session.query_one(&sql, &[]).await;
    Ok(row.map_err(|error| sqlstate::fault(&error).at(node.name()))?.get(0))
}

async fn table_exists(node: &Node<'_>, table: &str) -> Result<bool> {
    let client: &Client = &node.session;
    let row = client.query_one("SELECT to_regclass('sitepair.' || $1::text) IS NOT NULL", &[&table]).await;
    Ok(row.map_err(|error| sqlstate::fault(&error).at(node.name()))?.get(0))
}
