//! `sitepair deploy` and `sitepair undeploy`.

use std::io::{BufRead, IsTerminal};

use super::args::{DeployArgs, UndeployArgs};
use super::output::Output;
use super::plan;
use crate::config::Pipeline;
use crate::deploy::{self, Options};
use crate::model::{Code, Fault, Result};

/// Installs, or prints the script that would.
///
/// # Errors
/// A blocking finding, or what kept a step from being made.
pub async fn deploy(pipeline: &Pipeline, args: &DeployArgs, output: Output) -> Result<u8> {
    if args.print {
        output.raw(deploy::print(pipeline).await?.as_bytes());
        return Ok(0);
    }
    let report = deploy::deploy(pipeline, &Options { only: args.only.clone(), timeout: Some(args.timeout) }).await?;
    plan::show(&report, "done", output)?;
    Ok(0)
}

/// Removes; asks first where a journal would go with it.
///
/// # Errors
/// What kept a step from being made; `Usage` when there is a journal and nobody to ask.
pub async fn undeploy(pipeline: &Pipeline, args: &UndeployArgs, output: Output) -> Result<u8> {
    let mut yes = args.yes;
    if !yes && deploy::holds_history(pipeline, args.only.as_deref()).await? {
        yes = ask("The journal or parked operations at the target will be dropped. Go on? [y/N] ")?;
        if !yes {
            return Err(Fault::new(Code::Usage, "undeploy would drop the journal or parked operations")
                .remedy("say --yes if that is meant"));
        }
    }
    let report = deploy::undeploy(pipeline, args.only.as_deref(), yes).await?;
    plan::show(&report, "done", output)?;
    Ok(0)
}

/// Asks a person; without a terminal the answer is no.
pub(super) fn ask(question: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Ok(false);
    }
    eprint!("{question}");
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    read.map_err(|error| Fault::new(Code::Io, format!("stdin: {error}")))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
