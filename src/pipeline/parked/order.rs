//! Which parked operations wait for which others.

use std::collections::HashMap;

use crate::model::{FlowName, Result};
use crate::postgres::session::Session;
use crate::postgres::sqlstate;

/// Of all parked operations of a flow, by number.
#[derive(Default)]
pub(super) struct Order {
    behind: HashMap<i64, Vec<i64>>,
    under: HashMap<i64, Vec<i64>>,
}

impl Order {
    /// What is parked now.
    ///
    /// Of the older operations that hold a key or value, only the next one is given: it waits for the others itself, since
    /// an operation needs all that it holds. It needs besides what may be equal to any value of an index.
    ///
    /// # Errors
    /// What the server says.
    pub async fn read(target: &Session, flow: &FlowName) -> Result<Self> {
        const ORDER: &str = "WITH mine AS (SELECT id, next_offset, table_schema AS s, table_name AS n, key, old_key, held \
               FROM sitepair.parked WHERE flow = $1), \
             terms AS (SELECT id, s, n, 'key' AS kind, k AS term, true AS holds FROM mine CROSS JOIN LATERAL (VALUES (key), (old_key)) v (k) \
                 WHERE k IS NOT NULL \
               UNION ALL SELECT id, s, n, 'value', v, true FROM mine CROSS JOIN LATERAL jsonb_array_elements(held) e (v) \
               UNION ALL SELECT id, s, n, 'value', jsonb_build_array(v -> 0), false FROM mine CROSS JOIN LATERAL jsonb_array_elements(held) e (v)), \
             older AS (SELECT id, max(id) FILTER (WHERE holds) OVER (PARTITION BY s, n, kind, term ORDER BY id \
                 RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS other FROM terms) \
             SELECT DISTINCT id, other, true FROM older WHERE other IS NOT NULL \
             UNION ALL SELECT p.id, o.id, false FROM mine p JOIN mine o ON o.s = p.s AND o.n = p.n AND o.next_offset = p.next_offset \
               AND o.old_key = p.key AND o.id > p.id \
             ORDER BY 1, 2";
        let rows = target.query(ORDER, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
        let mut order = Self::default();
        for row in rows {
            let ones = if row.get(2) { &mut order.behind } else { &mut order.under };
            ones.entry(row.get(0)).or_default().push(row.get(1));
        }
        Ok(order)
    }

    /// Older ones of the same key or unique value that go before it.
    pub fn behind(&self, id: i64) -> &[i64] {
        self.behind.get(&id).map_or(&[], Vec::as_slice)
    }

    /// Later ones of its group whose row has its key still.
    pub fn under(&self, id: i64) -> &[i64] {
        self.under.get(&id).map_or(&[], Vec::as_slice)
    }
}
