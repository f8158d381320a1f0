//! The applier's session at the target: settings, origin, prepared statements, and statements sent in one flight.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Error, Row, Statement};

use super::ApplierParts;
use super::checkpoint::{self, Step};
use super::literal::Param;
use super::table::{Catalog, Misfit, Table};
use crate::model::{Code, Fault, Result, TableName, Track};
use crate::postgres::session::{self, Session};
use crate::postgres::{catalog, origin, sqlstate};

/// Statements kept prepared; when there are more shapes than that, all are prepared anew.
const STATEMENTS: usize = 1000;

/// Keys are looked up by index whatever the statistics say: a plan made while a table was empty must not scan it once it
/// has grown.
const SETTINGS: &str = "SET session_replication_role = replica; SET row_security = off; \
     SET client_min_messages = error; SET jit = off; SET plan_cache_mode = force_generic_plan; \
     SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off";

/// The session and what it knows.
pub(super) struct Target {
    pub session: Arc<Session>,
    pub catalog: Catalog,
    statements: HashMap<String, Statement>,
    /// What opened the transaction, sent but not yet answered.
    opening: Option<Opening>,
    /// A COMMIT has met an error in the data: triggers that are deferred, and fire for applied rows too. From then on they are
    /// fired before it, where an error can still be told to be one of the rows'.
    late: bool,
}

/// An answer that is awaited together with those to what was sent after it.
type Opening = Pin<Box<dyn Future<Output = std::result::Result<(), Error>> + Send>>;

/// One statement of a flight.
pub(super) struct Item<'a> {
    pub sql: String,
    pub params: Vec<Param<'a>>,
    pub table: Arc<Table>,
}

/// Why something could not be written.
#[derive(Debug)]
pub(super) enum Failure {
    /// The rows themselves: the ladder's business.
    Data(Culprit),
    /// The target's tables are not what the catalog said; worth one more try with a new one.
    Stale(Misfit),
    /// Anything else: connection, contention, rights, …
    Fault(Fault),
}

/// How a COPY carries rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CopyFormat {
    Text,
    Binary,
}

/// What the server said about rows of a table.
#[derive(Debug, Clone)]
pub(super) struct Culprit {
    pub table: TableName,
    pub sqlstate: String,
    /// Without row values.
    pub what: String,
    /// A value that must be unique is not, or rows exclude each other.
    pub collision: bool,
    /// The COPY that met it, if one did.
    pub copied: Option<CopyFormat>,
    /// No partition takes the row.
    pub unrouted: bool,
}

impl Culprit {
    /// Found before the server was asked.
    pub fn ours(table: &TableName, what: &str) -> Self {
        let (table, sqlstate, what) = (table.clone(), String::new(), what.to_owned());
        Self { table, sqlstate, what, collision: false, copied: None, unrouted: false }
    }

    /// The value itself was refused, or was missing: the table may have another shape than the record.
    pub fn may_be_drift(&self) -> bool {
        self.unrouted
            || self.sqlstate.starts_with("22")
            || ["42804", "42846", "23502"].contains(&self.sqlstate.as_str())
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Failure::Fault(fault)
    }
}

impl Failure {
    /// What an error of a statement on that table means.
    pub fn of(error: &Error, table: &TableName) -> Self {
        let fault = sqlstate::fault(error);
        let Some(state) = error.code() else { return Failure::Fault(fault.at(table)) };
        if sqlstate::is_data_error(error) {
            let collision = *state == SqlState::UNIQUE_VIOLATION || *state == SqlState::EXCLUSION_VIOLATION;
            let table = table.clone();
            let sqlstate = state.code().to_owned();
            // A CHECK of the table or of a domain has a name.
            let named = error.as_db_error().is_some_and(|words| words.constraint().is_some());
            let unrouted = *state == SqlState::CHECK_VIOLATION && !named;
            return Failure::Data(Culprit { table, sqlstate, what: fault.what, collision, copied: None, unrouted });
        }
        // "cached plan must not change result type"; no operator for the types that two columns have by now; a key that is
        // deferrable by now is no arbiter of ON CONFLICT
        let stale = [
            SqlState::FEATURE_NOT_SUPPORTED,
            SqlState::UNDEFINED_FUNCTION,
            SqlState::AMBIGUOUS_FUNCTION,
            SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
        ];
        let fault = fault.at(table);
        if fault.code == Code::ShapeMismatch || stale.contains(state) {
            Failure::Stale(Misfit::new(table, fault))
        } else {
            Failure::Fault(fault)
        }
    }
}

impl Target {
    /// Connects, takes the track's origin, reads the catalog.
    ///
    /// # Errors
    /// `SecondApplier` when the origin is in use, `NotDeployed` when it is missing.
    pub async fn open<R>(parts: &ApplierParts<R>, track: Track) -> Result<Self> {
        let (info, flow) = (&parts.target, &parts.flow);
        let session = session::connect(info, &parts.application).await?;
        let settings = format!("{SETTINGS}; SET synchronous_commit = {}", parts.synchronous_commit.as_str());
        session.batch_execute(&settings).await.map_err(|error| sqlstate::fault(&error).at(info))?;
        origin::session_setup(&session, &flow.origin(track)).await.map_err(|fault| fault.at(info))?;
        let (catalog, statements) = (Catalog::default(), HashMap::new());
        let mut target = Self { session: Arc::new(session), catalog, statements, opening: None, late: false };
        target.refresh().await?;
        Ok(target)
    }

    /// Forgets what was known of the target's tables, and reads it again.
    pub async fn refresh(&mut self) -> Result<()> {
        self.statements.clear();
        let tables = catalog::tables(&self.session).await?;
        self.catalog = Catalog::load(&self.session, tables).await?;
        Ok(())
    }

    /// The statement, prepared once.
    pub async fn prepare(&mut self, sql: &str) -> std::result::Result<Statement, Error> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let statement = self.session.prepare(sql).await?;
        if self.statements.len() >= STATEMENTS {
            self.statements.clear();
        }
        self.statements.insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }

    /// Sends what opens a transaction or a savepoint. The server executes in the order of sending, so the next statement
    /// need not wait for the answer.
    pub async fn open_with(&mut self, sql: &'static str) -> Result<()> {
        self.opened().await?;
        let session = Arc::clone(&self.session);
        let mut opening: Opening = Box::pin(async move { session.batch_execute(sql).await });
        // The first poll sends it.
        match futures_util::poll!(&mut opening) {
            Poll::Ready(answered) => answered.map_err(|error| sqlstate::fault(&error)),
            Poll::Pending => {
                self.opening = Some(opening);
                Ok(())
            }
        }
    }

    /// Waits for the answer to [`Target::open_with`].
    async fn opened(&mut self) -> Result<()> {
        match self.opening.take() {
            Some(opening) => opening.await.map_err(|error| sqlstate::fault(&error)),
            None => Ok(()),
        }
    }

    /// Several statements, one round trip.
    pub async fn batch(&mut self, sql: &str) -> Result<()> {
        self.opened().await?;
        self.session.batch_execute(sql).await.map_err(|error| sqlstate::fault(&error))
    }

    /// Ends the transaction. The first error of deferred triggers is given as contention where the unit can be tried `again`:
    /// then it meets the error in [`Target::fire_late`].
    pub async fn commit(&mut self, again: bool) -> Result<()> {
        self.opened().await?;
        let committed = self.session.batch_execute("COMMIT").await;
        committed.map_err(|error| match sqlstate::fault(&error) {
            fault if again && !self.late && fault.code == Code::DataError => {
                self.late = true;
                Fault::new(Code::Contention, fault.what)
            }
            fault => fault,
        })
    }

    /// Fires what is deferred to COMMIT, if anything is known to be; `table` is named where the server names none.
    pub async fn fire_late(&mut self, table: &TableName) -> std::result::Result<(), Failure> {
        const FIRE: &str = "SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED";
        if !self.late {
            return Ok(());
        }
        self.opened().await?;
        self.session.batch_execute(FIRE).await.map_err(|error| {
            let named = error.as_db_error().and_then(|words| Some((words.schema()?, words.table()?)));
            Failure::of(&error, &named.map_or_else(|| table.clone(), |(schema, name)| TableName::new(schema, name)))
        })
    }

    /// Sends origin, checkpoint and journal of the open transaction.
    pub async fn advance(&mut self, step: &Step<'_>) -> Result<()> {
        let not_deployed = |error: Error| checkpoint::not_deployed(&error);
        self.opened().await?;
        let origin = self.prepare(checkpoint::ORIGIN).await.map_err(not_deployed)?;
        let advance = self.prepare(checkpoint::ADVANCE).await.map_err(not_deployed)?;
        step.send(&self.session, &origin, &advance).await.map_err(|error| match error.as_db_error() {
            Some(words) if words.code().code() == checkpoint::MOVED => {
                Fault::new(Code::CheckpointMoved, words.message())
            }
            Some(_) | None => sqlstate::fault(&error),
        })
    }

    /// What a query about a table gives.
    pub async fn rows(
        &mut self,
        table: &Table,
        sql: &str,
        params: &[Param<'_>],
    ) -> std::result::Result<Vec<Row>, Failure> {
        self.opened().await?;
        let failure = |error: Error| Failure::of(&error, &table.relation.table);
        let statement = self.prepare(sql).await.map_err(failure)?;
        let params: Vec<_> = params.iter().map(|param| param as &(dyn ToSql + Sync)).collect();
        self.session.query(&statement, &params).await.map_err(failure)
    }

    /// Sends all at once and gives the rows that each affected.
    pub async fn flight(&mut self, items: &[Item<'_>]) -> std::result::Result<Vec<u64>, Failure> {
        let mut statements = Vec::with_capacity(items.len());
        for item in items {
            let prepared = self.prepare(&item.sql).await;
            statements.push(prepared.map_err(|error| Failure::of(&error, &item.table.relation.table))?);
        }
        let params: Vec<Vec<&(dyn ToSql + Sync)>> =
            items.iter().map(|item| item.params.iter().map(|param| param as &(dyn ToSql + Sync)).collect()).collect();
        let session = Arc::clone(&self.session);
        // A first poll sends a statement; what is sent is answered in the same order.
        let mut sent = Vec::with_capacity(items.len());
        for (statement, params) in statements.iter().zip(&params) {
            let mut answer = Box::pin(session.execute(statement, params));
            let early = futures_util::poll!(&mut answer);
            sent.push((answer, early));
        }
        let mut outcome = self.opened().await.map(|()| Vec::with_capacity(items.len())).map_err(Failure::Fault);
        for ((answer, early), item) in sent.into_iter().zip(items) {
            let answered = match early {
                Poll::Ready(answered) => answered,
                Poll::Pending => answer.await,
            };
            match (&mut outcome, answered) {
                (Ok(counts), Ok(count)) => counts.push(count),
                (Ok(_), Err(error)) => outcome = Err(Failure::of(&error, &item.table.relation.table)),
                // What follows an error is refused until the rollback.
                (Err(_), Ok(_) | Err(_)) => {}
            }
        }
        outcome
    }
}
