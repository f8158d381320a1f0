//! What becomes of displaced rows that no record has settled when their scope ends: the horizon, or the transaction that
//! came in pieces (H4e).

use std::sync::Arc;

use super::halt::Halt;
use super::ladder::Ladder;
use super::park::{ParkedRow, When};
use super::table::Table;
use super::target::Failure;
use super::tracks::settled_by;
use super::write::Effects;
use crate::config::OnError;
use crate::model::{Code, Fault, TableName};
use crate::postgres::{sqlstate, table_state};

impl Ladder {
    /// Puts displaced rows back that no record has settled; one that conflicts is parked, or stops a transaction that is
    /// no horizon's business (H4e).
    pub async fn finish_scope(&mut self, effects: &mut Effects, scope: &str) -> Result<(), Halt> {
        let (flow, own) = (self.checkpoint.flow.clone(), settled_by(self.checkpoint.track));
        if scope == "transaction" && effects.horizon.is_before() {
            let widen = "UPDATE sitepair.displaced d SET scope = 'horizon' WHERE flow = $1 AND scope = 'transaction'";
            let widened = self.writer.target.session.execute(&format!("{widen} AND {own}"), &[&flow]).await;
            return widened.map(|_| ()).map_err(|error| sqlstate::fault(&error).into());
        }
        let sql = format!(
            "DELETE FROM sitepair.displaced d WHERE flow = $1 AND scope = $2 AND {own} \
             RETURNING id, table_schema, table_name, key::text, whole_row, layout::text"
        );
        let left = self.writer.target.session.query(&sql, &[&flow, &scope]).await;
        let mut left = left.map_err(|error| sqlstate::fault(&error))?;
        left.sort_by_key(|row| row.get::<_, i64>(0));
        for row in left {
            let name = TableName::new(row.get::<_, String>(1), row.get::<_, String>(2));
            let key: String = row.get(3);
            let image: (String, Option<String>) = (row.get(4), row.get(5));
            let table = self.whole(&name).await?;
            self.savepoint().await?;
            let put = self.writer.target.session.execute(&table.restore(), &[&image.0, &image.1]).await;
            let outcome = put.map(|_| ()).map_err(|error| Failure::of(&error, &name));
            let culprit = match self.judged(outcome).await {
                Ok(culprit) => culprit,
                Err(Failure::Data(culprit)) => Some(culprit),
                Err(Failure::Stale(misfit)) => {
                    let now = table_state::definition(&self.writer.target.session, &name).await?;
                    return Err(self.halt(misfit, now));
                }
                Err(Failure::Fault(fault)) => return Err(fault.into()),
            };
            let Some(culprit) = culprit else {
                effects.notes.add(&name, "restored", 1);
                continue;
            };
            if scope == "transaction" && self.on_error == OnError::Stop {
                let what = format!("flow {flow}, table {name}, key {key}: {}", culprit.what);
                return Err(Fault::new(Code::DataError, what).into());
            }
            let when = When { next: effects.next, end_lsn: self.checkpoint.end_lsn, commit_time_us: None };
            ParkedRow::restore(name.clone(), key, &culprit)
                .store_whole(&self.writer.target.session, &flow, when, &image)
                .await?;
            effects.notes.add(&name, "parked", 1);
            effects.parked += 1;
        }
        Ok(())
    }

    /// A table as it is now, for rows that are put back whole.
    async fn whole(&mut self, name: &TableName) -> Result<Arc<Table>, Halt> {
        if self.writer.target.catalog.whole(name).is_err() {
            let before = self.look_again(name).await?;
            return self.writer.target.catalog.whole(name).map_err(|misfit| Halt::Misfit(misfit, before));
        }
        self.writer.target.catalog.whole(name).map_err(|misfit| misfit.fault.into())
    }
}
