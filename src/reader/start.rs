//! Where a reader begins (P0, P3). Pure.

use crate::model::{Code, Fault, FlowIdentity, Lsn, Result};

/// What the first record is, and where the chain of positions goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// The topic is empty and nothing was confirmed since deploy: write the genesis record, then go on from there.
    Genesis(Lsn),
    /// The topic ends here; what the slot sends again up to here is compared and dropped.
    GoOn(Lsn),
}

/// Decides from the topic's durable end and the slot's `confirmed_flush_lsn`.
///
/// # Errors
/// `Gap` when the slot has moved past what the topic holds, `ForeignSlot` when it lies before the point where it was made.
pub fn start(tail: Option<Lsn>, confirmed: Lsn, identity: &FlowIdentity) -> Result<Start> {
    let slot = &identity.genesis.slot;
    let start_lsn = identity.start_lsn;
    if confirmed < start_lsn {
        let what = format!("slot \"{slot}\" stands at {confirmed}, before the point {start_lsn} where it was made");
        return Err(Fault::new(Code::ForeignSlot, what));
    }
    let end = tail.unwrap_or(start_lsn);
    if confirmed > end {
        let holds = if tail.is_some() { "the topic ends at" } else { "the topic is empty and opens at" };
        let what = format!("slot \"{slot}\" was confirmed up to {confirmed}, {holds} {end}");
        return Err(Fault::new(Code::Gap, what));
    }
    if end < start_lsn {
        let what = format!("the topic ends at {end}, before this flow began at {start_lsn}");
        return Err(Fault::new(Code::BrokenChain, what));
    }
    Ok(if tail.is_some() { Start::GoOn(end) } else { Start::Genesis(end) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::testing::flow_identity;

    #[test]
    fn each_pair_of_positions_has_its_start() {
        let identity = FlowIdentity { start_lsn: Lsn(100), ..flow_identity() };
        let cases = [
            (None, 100, Ok(Start::Genesis(Lsn(100)))),
            (None, 101, Err(Code::Gap)),
            (None, 99, Err(Code::ForeignSlot)),
            (Some(100), 100, Ok(Start::GoOn(Lsn(100)))),
            (Some(150), 100, Ok(Start::GoOn(Lsn(150)))),
            (Some(150), 150, Ok(Start::GoOn(Lsn(150)))),
            (Some(150), 151, Err(Code::Gap)),
            (Some(150), 99, Err(Code::ForeignSlot)),
            (Some(99), 100, Err(Code::Gap)),
        ];
        for (tail, confirmed, expected) in cases {
            let result = start(tail.map(Lsn), Lsn(confirmed), &identity).map_err(|fault| fault.code);
            assert_eq!(result, expected, "tail {tail:?}, confirmed {confirmed}");
        }
    }
}
