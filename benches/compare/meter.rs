//! What processes use while a contestant runs, from /proc.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Between two looks; what a process uses between the last one and its end is not seen.
const EVERY: Duration = Duration::from_millis(100);

/// Whose processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Home {
    Source,
    Target,
    Client,
    /// Kafka's broker; its peak is that of the run.
    Broker,
}

/// What one process has used.
#[derive(Debug, Clone, Default)]
struct Process {
    label: String,
    user_s: f64,
    system_s: f64,
    peak_bytes: u64,
    written_bytes: u64,
}

/// What processes of one kind used together.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct Use {
    pub user_s: f64,
    pub system_s: f64,
    /// The largest of them.
    pub peak_bytes: u64,
    pub written_bytes: u64,
}

impl Use {
    /// CPU seconds.
    pub fn cpu_s(&self) -> f64 {
        self.user_s + self.system_s
    }
}

/// Looks at processes until told to stop.
pub struct Meter {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<BTreeMap<u32, (Process, Process)>>,
    loopback_bytes: u64,
}

/// What was used, by kind of process.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    pub by_kind: BTreeMap<String, Use>,
    pub loopback_bytes: u64,
}

impl Meter {
    /// Looks at the children of these processes, and at the processes themselves where they are clients. `but` are sessions
    /// of the benchmark itself.
    pub fn start(roots: Vec<(u32, Home)>, but: Vec<u32>) -> Self {
        for (broker, _) in roots.iter().filter(|(_, home)| *home == Home::Broker) {
            // proc(5): sets the peak back to what is there now.
            let _ = fs::write(format!("/proc/{broker}/clear_refs"), "5");
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let mut seen: BTreeMap<u32, (Process, Process)> = BTreeMap::new();
        // Who is there now has used something before; who comes later begins with nothing.
        look(&roots, &but, &mut seen);
        for (first, last) in seen.values_mut() {
            *first = last.clone();
        }
        let run = move || {
            loop {
                let ends = stopped.load(Ordering::Relaxed);
                look(&roots, &but, &mut seen);
                if ends {
                    return seen;
                }
                std::thread::park_timeout(EVERY);
            }
        };
        Self { stop, thread: std::thread::spawn(run), loopback_bytes: loopback_bytes() }
    }

    /// A last look, and what came of all.
    pub fn stop(self) -> Usage {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        let mut usage = Usage { loopback_bytes: loopback_bytes() - self.loopback_bytes, ..Usage::default() };
        for (first, last) in self.thread.join().expect("the meter ends").into_values() {
            let kind = usage.by_kind.entry(last.label).or_default();
            kind.user_s += last.user_s - first.user_s;
            kind.system_s += last.system_s - first.system_s;
            kind.peak_bytes = kind.peak_bytes.max(last.peak_bytes);
            kind.written_bytes += last.written_bytes - first.written_bytes;
        }
        usage
    }
}

fn look(roots: &[(u32, Home)], but: &[u32], seen: &mut BTreeMap<u32, (Process, Process)>) {
    for (root, home) in roots {
        let mut pids = vec![*root];
        if matches!(home, Home::Source | Home::Target) {
            let children = fs::read_to_string(format!("/proc/{root}/task/{root}/children")).unwrap_or_default();
            pids = children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
        }
        for pid in pids.into_iter().filter(|pid| !but.contains(pid)) {
            let before = seen.get(&pid).map(|(_, last)| last.label.as_str());
            if let Some(mut process) = process(pid, *home, before) {
                let known = seen.entry(pid).or_default();
                // A process that has ended shows its times until it is waited for, but no memory.
                process.peak_bytes = process.peak_bytes.max(known.1.peak_bytes);
                process.written_bytes = process.written_bytes.max(known.1.written_bytes);
                known.1 = process;
            }
        }
    }
}

fn process(pid: u32, home: Home, before: Option<&str>) -> Option<Process> {
    let read = |what: &str| fs::read_to_string(format!("/proc/{pid}/{what}")).ok();
    let stat = read("stat")?;
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split_whitespace().collect();
    // proc(5): the 14th and 15th fields, in clock ticks, a hundred a second on Linux; the 3rd is the first one here.
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default() / 100.0;
    let number = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().and_then(|number| number.parse::<u64>().ok()).unwrap_or_default()
    };
    let label = match before {
        Some(label) if label != STARTING => label.to_owned(),
        _ => label(home, &read("cmdline")?),
    };
    let peak_bytes = number(&read("status").unwrap_or_default(), "VmHWM:") * 1024;
    let written_bytes = number(&read("io").unwrap_or_default(), "write_bytes:");
    Some(Process { label, user_s: ticks(11), system_s: ticks(12), peak_bytes, written_bytes })
}

/// A server's process that has not set its title yet.
const STARTING: &str = "starting";

fn label(home: Home, title: &str) -> String {
    let label = match home {
        Home::Client => "client",
        Home::Broker => "broker",
        _ if !title.starts_with("postgres: ") => STARTING,
        // Walsenders, and sessions that decode by SQL.
        Home::Source if title.contains(" 127.0.0.1(") => "source, sessions",
        Home::Source => "source, other",
        Home::Target if title.contains(" apply worker") || title.contains(" parallel worker") => "target, apply",
        Home::Target if title.contains(" 127.0.0.1(") => "target, apply",
        Home::Target => "target, other",
    };
    label.to_owned()
}

fn loopback_bytes() -> u64 {
    let devices = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let loopback = devices.lines().find_map(|line| line.trim_start().strip_prefix("lo:")).unwrap_or_default();
    loopback.split_whitespace().next().and_then(|bytes| bytes.parse().ok()).unwrap_or_default()
}
