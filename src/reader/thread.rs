//! A reader has a thread and a runtime of its own.
//!
//! While behind, it lets bytes gather between two reads of the stream. On a runtime that others share, another thread
//! would wait for the socket meanwhile, and the server would wake it by each message that it sends, which costs both.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;

use crate::model::{Code, Fault, Result};

/// So long the thread stays for what was left to be said, such as the end of a stream, after its work has ended.
const FAREWELL: Duration = Duration::from_secs(1);

/// Runs what `work` makes on a thread of its own, and returns its answer. Dropping the future ends the work at its next
/// point of waiting.
///
/// # Errors
/// Those of the work; `Io` when no thread can be had, or when it ends without an answer.
pub async fn on_own_thread<T, F>(name: &str, work: impl FnOnce() -> F + Send + 'static) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>>,
{
    let io = |what: String| Fault::new(Code::Io, format!("the thread \"{name}\": {what}"));
    let runtime = Builder::new_current_thread().enable_all().build().map_err(|error| io(error.to_string()))?;
    let (answer, answered) = oneshot::channel();
    // Kept until the answer is there: dropped earlier, it tells the thread to end.
    let (_wanted, mut given_up) = oneshot::channel::<()>();
    let span = tracing::Span::current();
    let run = move || {
        let _within = span.entered();
        let done = runtime.block_on(async {
            tokio::select! {
                done = work() => Some(done),
                _ = &mut given_up => None,
            }
        });
        say_farewell(&runtime);
        if let Some(done) = done {
            // Nobody may be there any more to hear it.
            let _ = answer.send(done);
        }
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(|error| io(error.to_string()))?;
    answered.await.unwrap_or_else(|_| Err(io("it ended without an answer".to_owned())))
}

/// Lets the tasks that the work has left behind come to their end.
fn say_farewell(runtime: &Runtime) {
    let since = Instant::now();
    while runtime.metrics().num_alive_tasks() > 0 && since.elapsed() < FAREWELL {
        runtime.block_on(async { tokio::time::sleep(Duration::from_millis(1)).await });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[tokio::test]
    async fn the_answer_comes_back_after_what_was_left_behind() {
        let said = Arc::new(AtomicBool::new(false));
        let says = Arc::clone(&said);
        let answer = on_own_thread("test", move || async move {
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                says.store(true, Ordering::SeqCst);
            });
            Ok(std::thread::current().name().map(str::to_owned))
        });
        assert_eq!(answer.await, Ok(Some("test".to_owned())));
        assert!(said.load(Ordering::SeqCst));
        let fault = on_own_thread("test", || async { Err::<(), _>(Fault::new(Code::Timeout, "late")) }).await;
        assert_eq!(fault.map_err(|fault| fault.code), Err(Code::Timeout));
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_ends() {
        let (alive, mut lives) = tokio::sync::watch::channel(());
        let work = on_own_thread("test", move || async move {
            let _alive = alive;
            std::future::pending::<Result<()>>().await
        });
        assert!(tokio::time::timeout(Duration::from_millis(50), work).await.is_err());
        assert!(tokio::time::timeout(Duration::from_secs(5), lives.changed()).await.is_ok_and(|sent| sent.is_err()));
    }
}
