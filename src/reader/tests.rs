use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::testing::*;
use crate::config::{ColumnRule, Rule};
use crate::model::{Code, Datum, Fault, Lsn, Record, Stamp, TxMark};
use crate::ports::{Goal, Incoming};
use crate::rules;

/// Reads one transaction with these changes and compares what the topic holds of it.
async fn check(changes: Vec<Incoming>, expected: &str) {
    let mut rig = Rig::new();
    let mut messages = tx(200, changes);
    messages.push(keepalive(300, false));
    rig.read_to(300, messages).await.unwrap();
    let lines = rig.lines();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let tx = format!("tx 210: {expected}");
    if expected.is_empty() {
        assert_eq!(lines, ["genesis 100", "progress 300"]);
    } else {
        assert_eq!(lines, ["genesis 100", &tx, "progress 300"]);
    }
}

#[tokio::test(start_paused = true)]
async fn changes_without_a_filter_pass_as_they_are() {
    check(vec![insert(1, "1|-|x")], "i:acc(1|-|x)").await;
    check(vec![update(1, "", "1|2|~")], "u:acc(1|2|~)").await;
    check(vec![update(1, "K1|-|-", "2|2|~")], "u:acc(1=>2|2|~)").await;
    check(vec![delete(1, "K1|-|-")], "d:acc(1)").await;
    check(vec![insert(1, "1|1|x"), delete(1, "K1|-|-"), insert(1, "1|2|y")], "i:acc(1|1|x) d:acc(1) i:acc(1|2|y)")
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_key_stored_out_of_line_is_no_key_change_and_comes_from_the_old_tuple() {
    check(vec![update(1, "K1|-|-", "~|2|x")], "u:acc(1|2|x)").await;
    check(vec![update(1, "K1|-|-", "1|2|x")], "u:acc(1|2|x)").await;
}

#[tokio::test(start_paused = true)]
async fn a_filter_lets_rows_in_and_out() {
    check(vec![insert(2, "1|1|x")], "i:some(1|1|x)").await;
    check(vec![insert(2, "1|2|x")], "").await;
    check(vec![insert(2, "1|-|x")], "").await;
    check(vec![update(2, "", "1|1|x")], "u:some(1|1|x)").await;
    check(vec![update(2, "", "1|2|x")], "d:some(1)").await;
    check(vec![update(2, "", "1|2|~")], "d:some(1)").await;
    check(vec![update(2, "K1|-|-", "5|1|x")], "u:some(1=>5|1|x)").await;
    check(vec![update(2, "K1|-|-", "5|2|x")], "d:some(1)").await;
    check(vec![delete(2, "K1|-|-")], "d:some(1)").await;
}

#[tokio::test(start_paused = true)]
async fn unchanged_values_of_a_filtered_table_come_from_the_source() {
    let row = |id: &str, grp: &str| [id, grp, "stored"].map(Datum::text).to_vec();
    let cases = [
        ("", "1|1|~", Some(row("1", "1")), "u:some(1|1|stored)@"),
        ("", "1|1|~", None, "d:some(1)"),
        ("K1|-|-", "5|1|~", Some(row("5", "1")), "u:some(1=>5|1|stored)@"),
        ("K1|-|-", "5|1|~", None, "d:some(1)"),
        // The filter itself depends on what was not sent.
        ("", "1|~|x", Some(row("1", "1")), "u:some(1|1|x)@"),
        ("", "1|~|x", Some(row("1", "2")), "d:some(1)"),
    ];
    for (old, new, stored, expected) in cases {
        let mut rig = Rig::new();
        let key = new.split('|').next().unwrap_or_default();
        rig.seen.lock().unwrap().rows.extend(stored.map(|row| (format!("some({key})"), row)));
        rig.read_to(210, tx(200, vec![update(2, old, new)])).await.unwrap();
        assert_eq!(rig.lines(), ["genesis 100", &format!("tx 210: {expected}")], "{old} -> {new}");
        assert_eq!(rig.seen.lock().unwrap().fetched, [format!("some({key})")]);
    }
    // Nothing is fetched where nothing is missing, or the row leaves anyway.
    for new in ["1|1|x", "1|2|~"] {
        let mut rig = Rig::new();
        rig.read_to(210, tx(200, vec![update(2, "", new)])).await.unwrap();
        assert!(rig.seen.lock().unwrap().fetched.is_empty(), "{new}");
    }
}

#[tokio::test(start_paused = true)]
async fn under_full_identity_the_old_row_fills_the_new_one() {
    for (oid, old, new, expected) in [
        (1, "O1|1|old", "1|2|~", "u:acc(1|2|old)"),
        (1, "O1|1|old", "2|2|~", "u:acc(1=>2|2|old)"),
        (2, "O1|1|old", "1|1|~", "u:some(1|1|old)"),
        (2, "O1|2|old", "1|1|~", "u:some(1|1|old)"),
        (2, "O1|1|old", "1|2|~", "d:some(1)"),
    ] {
        let mut rig = Rig::new();
        let full = |oid, name| relation(oid, name, b'f', &["*id", "*grp", "*note"]);
        let messages =
            vec![begin(200), full(1, "acc"), full(2, "some"), update(oid, old, new), delete(oid, old), commit(200)];
        rig.read_to(210, messages).await.unwrap();
        let name = if oid == 1 { "acc" } else { "some" };
        assert_eq!(rig.lines(), ["genesis 100", &format!("tx 210: {expected} d:{name}(1)")]);
        assert!(rig.seen.lock().unwrap().fetched.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn truncate_follows_the_rule() {
    check(vec![truncate(&[1, 2, 3])], "t:acc,some").await;
    check(vec![truncate(&[3])], "").await;
}

#[tokio::test(start_paused = true)]
async fn columns_follow_the_rule_as_the_shape_changes() {
    let table = catalog_table(1, "acc");
    let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    for (columns, first, second) in [
        (ColumnRule::All, "i:acc(1|2|x)", "i:acc(new|1|x)"),
        (ColumnRule::Exclude(list(&["grp"])), "i:acc(1|x)", "i:acc(new|1|x)"),
        (ColumnRule::Include(list(&["id", "note"])), "i:acc(1|x)", "i:acc(1|x)"),
    ] {
        let mut rig = Rig::new();
        rig.selected = rules::select(&[Rule { columns, ..rule("acc") }], std::slice::from_ref(&table)).unwrap();
        let messages = vec![
            begin(200),
            relation(1, "acc", b'd', &["*id", "grp", "note"]),
            insert(1, "1|2|x"),
            relation(1, "acc", b'd', &["added", "*id", "note"]),
            insert(1, "new|1|x"),
            commit(200),
        ];
        rig.read_to(210, messages).await.unwrap();
        assert_eq!(rig.lines(), ["genesis 100", &format!("tx 210: {first} {second}")]);
    }
}

#[tokio::test(start_paused = true)]
async fn what_can_not_be_carried_stops_the_flow() {
    let cases: [(&str, Vec<Incoming>, Code); 10] = [
        ("unknown table", tx(200, vec![relation(9, "other", b'd', &["*id"]), delete(9, "K1")]), Code::UnknownRelation),
        ("identity nothing", tx(200, vec![relation(1, "acc", b'n', &["id", "grp"])]), Code::NoKey),
        ("identity elsewhere", tx(200, vec![relation(1, "acc", b'i', &["id", "*grp"])]), Code::NoKey),
        ("key dropped", tx(200, vec![relation(1, "acc", b'd', &["grp"])]), Code::NoKey),
        ("filter column dropped", tx(200, vec![relation(2, "some", b'd', &["*id"])]), Code::ShapeMismatch),
        ("no shape", tx(200, vec![insert(77, "1")]), Code::BadStream),
        ("too few values", tx(200, vec![insert(1, "1|2")]), Code::BadStream),
        ("row too large", tx(200, vec![insert(1, &format!("1|2|{}", "x".repeat(2000)))]), Code::RowTooLarge),
        ("outside", vec![insert(1, "1|2|x")], Code::BadStream),
        ("nested", vec![begin(200), begin(300)], Code::BadStream),
    ];
    for (name, messages, code) in cases {
        let mut rig = Rig::new();
        rig.max_row_bytes = 1000;
        let fault = rig.read_to(1 << 20, messages).await.expect_err(name);
        assert_eq!(fault.code, code, "{name}: {fault}");
        assert_eq!(rig.lines().len(), rig.seen.lock().unwrap().records.len().min(1), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn own_transactions_leave_a_watermark_and_foreign_ones_are_local_data() {
    let mut rig = Rig::new();
    let mut messages = Vec::new();
    for (at, name, lsn) in
        [(200, "sitepair_p_b_a", 77), (220, "pg_16389", 5), (240, "sitepair_p_c_a", 9), (260, "sitepair_p_b_a", 70)]
    {
        let change = insert(1, &format!("{at}|-|-"));
        messages.extend([vec![begin(at), origin(name, lsn)], shapes(), vec![change, commit(at)]].concat());
    }
    messages.extend(tx(280, vec![delete(1, "K1|-|-")]));
    rig.read_to(290, messages).await.unwrap();
    assert_eq!(rig.lines(), ["genesis 100", "tx 230 b@77: i:acc(220|-|-)", "tx 290 b@77 c@9: d:acc(1)"]);
}

#[tokio::test(start_paused = true)]
async fn a_repeated_transaction_is_compared_and_dropped() {
    let mut rig = Rig::new();
    let first = [tx(200, vec![insert(1, "1|-|-")]), tx(220, vec![insert(1, "2|-|-")])].concat();
    rig.read_to(230, first.clone()).await.unwrap();
    // Another reader, for which the slot still stands at 100.
    rig.read_to(250, [first.clone(), tx(240, vec![insert(1, "3|-|-")])].concat()).await.unwrap();
    let held = ["genesis 100", "tx 210: i:acc(1|-|-)", "tx 230: i:acc(2|-|-)", "tx 250: i:acc(3|-|-)"];
    assert_eq!(rig.lines(), held);

    // The same positions, other transactions (P3).
    for change in 0..3 {
        let mut forged = rig.seen.lock().unwrap().records.clone();
        let Stamp::Last { mark, rows } = forged[1].stamp else { panic!("a transaction") };
        let mark = match change {
            0 => TxMark { xid: 1, ..mark },
            1 => TxMark { commit_time_us: 1, ..mark },
            _ => mark,
        };
        forged[1] = Record { stamp: Stamp::Last { mark, rows }, body: forged[1].body.clone() };
        if change == 2 {
            forged.remove(2);
        }
        let mut other = Rig::new();
        {
            let mut seen = other.seen.lock().unwrap();
            seen.end_lsn = Some(Lsn(250));
            seen.records = forged;
        }
        let fault = other.read_to(300, [first.clone(), vec![keepalive(300, false)]].concat()).await.unwrap_err();
        assert_eq!(fault.code, Code::SourceChanged, "{fault}");
    }

    // Retention has dropped the oldest: what is older than the first one kept is no contradiction.
    let mut other = Rig::new();
    {
        let mut seen = other.seen.lock().unwrap();
        seen.end_lsn = Some(Lsn(250));
        seen.records = rig.seen.lock().unwrap().records.clone();
        seen.records.drain(..2);
    }
    assert_eq!(other.read_to(300, [first, vec![keepalive(300, false)]].concat()).await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_slot_past_the_topic_is_a_gap() {
    for (tail, confirmed, code) in [(None, 101, Code::Gap), (Some(200), 201, Code::Gap), (None, 99, Code::ForeignSlot)]
    {
        let mut rig = Rig::new();
        rig.confirmed = Lsn(confirmed);
        rig.seen.lock().unwrap().end_lsn = tail.map(Lsn);
        assert_eq!(rig.read_to(300, Vec::new()).await.map_err(|fault| fault.code), Err(code));
        let seen = rig.seen.lock().unwrap();
        assert!(seen.records.is_empty() && seen.confirmed.is_empty(), "nothing was touched");
    }
}

/// Runs a script for so long, then asks to stop.
async fn run_for(rig: &Rig, seconds: u64, steps: Vec<Step>) -> Result<super::ReaderState, Fault> {
    let (stopper, stop) = watch::channel(false);
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        stopper.send_replace(true);
    });
    let (result, state) = rig.run(steps, stop).await;
    result.map(|()| state)
}

#[tokio::test(start_paused = true)]
async fn an_idle_position_is_written_before_it_is_confirmed_and_not_too_often() {
    let rig = Rig::new();
    let steps = (0..100)
        .flat_map(|step| [Step::Messages(vec![keepalive(200 + step, false)]), Step::Pause(Duration::from_millis(100))]);
    let state = run_for(&rig, 20, steps.collect()).await.unwrap();
    let lines = rig.lines();
    assert_eq!(lines.last().unwrap(), "progress 299");
    assert!((9..=13).contains(&lines.len()), "{} records in ten busy seconds", lines.len());
    let seen = rig.seen.lock().unwrap();
    assert_eq!(seen.confirmed.last().unwrap().0, Lsn(299));
    assert!((20..=35).contains(&seen.confirmed.len()), "{} status updates in twenty seconds", seen.confirmed.len());
    assert_eq!((state.durable_lsn, state.confirmed_lsn, state.received_lsn), (Lsn(299), Lsn(299), Lsn(299)));
    assert!(state.heard_us > 0);
}

#[tokio::test(start_paused = true)]
async fn a_position_inside_a_transaction_is_never_taken() {
    let rig = Rig::new();
    let steps = vec![
        Step::Messages([vec![begin(500)], shapes(), vec![insert(1, "1|-|-"), keepalive(400, true)]].concat()),
        Step::Pause(Duration::from_secs(4)),
        Step::Fail(Fault::new(Code::Unreachable, "cut")),
    ];
    let fault = run_for(&rig, 60, steps).await.unwrap_err();
    assert_eq!(fault.code, Code::Unreachable);
    assert_eq!(rig.lines(), ["genesis 100"]);
    let seen = rig.seen.lock().unwrap();
    assert!(seen.confirmed.iter().all(|(lsn, _)| *lsn == Lsn(100)));
    assert!((15..=24).contains(&seen.confirmed.len()), "five answers a second at most: {}", seen.confirmed.len());
}

#[tokio::test(start_paused = true)]
async fn dropped_transactions_and_heartbeats_move_the_position() {
    let rig = Rig::new();
    let messages = [tx(200, vec![insert(2, "1|2|x")]), vec![begin(220), heartbeat(219), commit(220)]].concat();
    let state = run_for(&rig, 5, vec![Step::Messages(messages)]).await.unwrap();
    assert_eq!(rig.lines(), ["genesis 100", "progress 230"]);
    assert!(state.heartbeat_us > 0);
    assert_eq!((state.confirmed_lsn, state.transactions), (Lsn(230), 0));
}

#[tokio::test(start_paused = true)]
async fn a_full_topic_is_waited_for_while_status_goes_on_and_memory_stays_bounded() {
    let rig = Rig::new();
    let note = "x".repeat(500_000);
    let many: Vec<Step> = (0..200)
        .map(|number| Step::Messages(tx(200 + number * 20, vec![insert(1, &format!("{number}|-|{note}"))])))
        .collect();
    let seen = rig.seen.clone();
    seen.lock().unwrap().full = true;
    let watching = async {
        tokio::time::sleep(Duration::from_secs(30)).await;
        let mut seen = seen.lock().unwrap();
        assert!(seen.records.is_empty());
        assert!((25..=40).contains(&seen.confirmed.len()), "{} status updates in 30 s", seen.confirmed.len());
        seen.full = false;
    };
    let (state, ()) = tokio::join!(run_for(&rig, 60, many), watching);
    let state = state.unwrap();
    assert_eq!(rig.lines().len(), 201);
    assert_eq!((state.transactions, state.paused, state.confirmed_lsn), (200, false, Lsn(200 + 199 * 20 + 10)));
    assert!(rig.seen.lock().unwrap().largest_group <= 10, "an append is bounded by bytes");
}

#[tokio::test(start_paused = true)]
async fn progress_waits_until_all_before_it_is_durable() {
    let rig = Rig::new();
    let mut steps = vec![Step::Messages(tx(200, vec![insert(1, "1|-|-")]))];
    steps
        .extend((0..40).flat_map(|step| {
            [Step::Pause(Duration::from_secs(1)), Step::Messages(vec![keepalive(300 + step, false)])]
        }));
    let seen = rig.seen.clone();
    seen.lock().unwrap().full = true;
    let watching = async {
        tokio::time::sleep(Duration::from_secs(30)).await;
        seen.lock().unwrap().full = false;
    };
    let (state, ()) = tokio::join!(run_for(&rig, 60, steps), watching);
    assert_eq!(state.unwrap().confirmed_lsn, Lsn(339));
    let lines = rig.lines();
    assert_eq!(lines[..2], ["genesis 100", "tx 210: i:acc(1|-|-)"]);
    assert!((8..=13).contains(&lines.len()), "ten seconds of progress, not forty: {}", lines.len());
}

#[tokio::test(start_paused = true)]
async fn one_batch_of_messages_leaves_in_pieces_too() {
    let rig = Rig::new();
    let note = "x".repeat(500_000);
    let batch = (0..60).flat_map(|number| tx(200 + number * 20, vec![insert(1, &format!("{number}|-|{note}"))]));
    run_for(&rig, 20, vec![Step::Messages(batch.collect())]).await.unwrap();
    assert_eq!(rig.lines().len(), 61);
    assert!(rig.seen.lock().unwrap().largest_group <= 12, "{}", rig.seen.lock().unwrap().largest_group);
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_waits_for_a_full_topic_can_be_stopped() {
    let rig = Rig::new();
    rig.seen.lock().unwrap().full = true;
    let note = "x".repeat(800_000);
    let many =
        (0..100).map(|number| Step::Messages(tx(200 + number * 20, vec![insert(1, &format!("{number}|-|{note}"))])));
    let before = Instant::now();
    assert!(run_for(&rig, 10, many.collect()).await.unwrap().paused);
    assert!(before.elapsed() < Duration::from_secs(12));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_wants_to_stop_is_let_go() {
    let rig = Rig::new();
    rig.seen.lock().unwrap().full = true;
    // It asks again each time it is answered; the topic can't take the position.
    let steps =
        (0..10_000).flat_map(|_| [Step::Messages(vec![keepalive(300, true)]), Step::Pause(Duration::from_millis(1))]);
    let before = Instant::now();
    let fault = run_for(&rig, 600, steps.collect()).await.unwrap_err();
    assert_eq!(fault.code, Code::ServerBusy, "{fault}");
    assert!((4..=7).contains(&before.elapsed().as_secs()), "{:?}", before.elapsed());
    assert!(rig.seen.lock().unwrap().confirmed.len() <= 35, "no storm");
}

#[tokio::test(start_paused = true)]
async fn a_large_transaction_leaves_in_parts_while_it_comes_in() {
    let rig = Rig::new();
    let note = "x".repeat(100_000);
    let rows = |from: u32| (from..from + 50).map(|id| insert(1, &format!("{id}|-|{note}"))).collect::<Vec<_>>();
    let mut steps = vec![Step::Messages([vec![begin(90_000)], shapes(), rows(0)].concat())];
    for batch in 1..10 {
        steps.extend([Step::Pause(Duration::from_secs(1)), Step::Messages(rows(batch * 50))]);
    }
    let before_commit = rig.seen.clone();
    steps.extend([Step::Pause(Duration::from_secs(1)), Step::Messages(vec![commit(90_000)])]);
    let watching = async {
        tokio::time::sleep(Duration::from_millis(9500)).await;
        let seen = before_commit.lock().unwrap();
        assert!(seen.records.len() > 50, "parts are appended as they fill: {}", seen.records.len());
        assert!((7..=12).contains(&seen.confirmed.len()), "{:?}", seen.confirmed);
        assert!(seen.confirmed.iter().all(|(lsn, _)| *lsn == Lsn(100)));
        assert!(seen.records.iter().all(|record| record.body.len() <= 900_000));
    };
    let (state, ()) = tokio::join!(run_for(&rig, 20, steps), watching);
    assert_eq!(state.unwrap().confirmed_lsn, Lsn(90_010));
    let lines = rig.lines();
    assert_eq!((lines.len(), lines[1].matches("i:acc").count()), (2, 500));
}

#[tokio::test(start_paused = true)]
async fn a_row_larger_than_a_part_passes() {
    let mut rig = Rig::new();
    let note = "\"é\\".repeat(700_000);
    rig.read_to(210, tx(200, vec![insert(1, "1|-|a"), insert(1, &format!("2|-|{note}")), insert(1, "3|-|b")]))
        .await
        .unwrap();
    assert_eq!(rig.lines()[1], "tx 210: i:acc(1|-|a) i:acc(2|-|<2800000 bytes>) i:acc(3|-|b)");
    assert!(rig.seen.lock().unwrap().records.len() > 4);
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_transaction_is_read_again_whole() {
    let mut rig = Rig::new();
    let note = "x".repeat(500_000);
    let row = |id: u32| insert(1, &format!("{id}|-|{note}"));
    let half = [vec![begin(200)], shapes(), (0..6).map(row).collect()].concat();
    let cut = vec![
        Step::Messages(half),
        Step::Pause(Duration::from_secs(1)),
        Step::Fail(Fault::new(Code::Unreachable, "cut")),
    ];
    run_for(&rig, 60, cut).await.unwrap_err();
    assert!(rig.seen.lock().unwrap().records.len() > 2, "some parts are there");
    rig.read_to(210, tx(200, (0..6).map(row).collect())).await.unwrap();
    let lines = rig.lines();
    assert_eq!((lines.len(), lines[1].matches("i:acc").count()), (2, 6));
}

#[tokio::test(start_paused = true)]
async fn faults_of_the_parts_end_the_reader_as_they_are() {
    let rig = Rig::new();
    rig.seen.lock().unwrap().fault = Some(Fault::new(Code::DiskFull, "no space"));
    assert_eq!(run_for(&rig, 60, Vec::new()).await.unwrap_err().code, Code::DiskFull);

    // Three alike at one position end the flow, so each says where it was (P7).
    let rig = Rig::new();
    let steps = || [Step::Messages(tx(200, vec![insert(1, "1|-|-")])), Step::UntilDurable(Lsn(210))];
    let failed = || Step::Fail(Fault::new(Code::DecodeFailed, "invalid memory alloc request size"));
    let first = run_for(&rig, 60, steps().into_iter().chain([failed()]).collect()).await.unwrap_err();
    let second = run_for(&rig, 60, vec![failed()]).await.unwrap_err();
    assert_eq!(first, second);
    assert_eq!(first.what, "after 0/D2: invalid memory alloc request size");
}

#[tokio::test(start_paused = true)]
async fn a_goal_that_is_reached_already_needs_nothing() {
    let mut rig = Rig::new();
    rig.goal = Goal::Lsn(Lsn(90));
    rig.read_to(90, Vec::new()).await.unwrap();
    assert_eq!(rig.lines(), ["genesis 100"]);
}
