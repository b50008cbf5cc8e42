//! `remus enable` and `remus disable`: a domain's policy, which is a file, and a word to the daemon that it has changed.

use std::path::PathBuf;

use super::protect::Choices;
use crate::api::client::Call;
use crate::api::{ApiError, ErrorCode, Request, TargetSpec};
use crate::policy::{self, FOLDER, Policy};

/// Options of `remus enable`.
#[derive(Debug, clap::Args)]
pub struct Enable {
    /// Domain name. It need not run.
    pub domain: String,
    /// Host to keep the copy; with an empty --ssh, the shell command that carries the link.
    #[arg(long, value_name = "HOST")]
    pub to: String,
    /// How to protect it.
    #[command(flatten)]
    pub choices: Choices,
    /// Where the policies are.
    #[arg(long, hide = true, default_value = FOLDER)]
    pub folder: PathBuf,
}

/// Options of `remus disable`.
#[derive(Debug, clap::Args)]
pub struct Disable {
    /// Domain name.
    pub domain: String,
    /// End its protection too, if there is one.
    #[arg(long)]
    pub now: bool,
    /// Where the policies are.
    #[arg(long, hide = true, default_value = FOLDER)]
    pub folder: PathBuf,
}

fn failed(error: &std::io::Error) -> ApiError {
    let code = match error.kind() {
        std::io::ErrorKind::PermissionDenied => ErrorCode::Denied,
        std::io::ErrorKind::InvalidInput => ErrorCode::Invalid,
        _ => ErrorCode::Failed,
    };
    ApiError::new(code, error.to_string())
}

/// The policy that was typed.
///
/// # Errors
/// `Invalid` with a sentence about a value that makes no sense.
pub fn policy_of(enable: &Enable) -> Result<Policy, ApiError> {
    let invalid = |text: String| ApiError::new(ErrorCode::Invalid, text);
    // What runs under an id or a UUID next time is not known.
    if enable.domain.parse::<u32>().is_ok() || enable.domain.parse::<uuid::Uuid>().is_ok() {
        return Err(invalid(format!(
            "{}: give the domain's name; a policy is for whatever runs under it",
            enable.domain
        )));
    }
    let (target, options) = enable.choices.towards(&enable.to).map_err(invalid)?;
    Ok(Policy { target: TargetSpec::from(target), options })
}

/// Writes the policy and has the daemon act on it.
///
/// # Errors
/// [`ApiError`] when the file cannot be written, or when the daemon finds something wrong. That no daemon runs is none.
pub async fn enable(socket: &std::path::Path, enable: &Enable) -> Result<serde_json::Value, ApiError> {
    let policy = policy_of(enable)?;
    let path = policy::write(&enable.folder, &enable.domain, &policy).map_err(|error| failed(&error))?;
    let told = tell(socket, Some(enable.domain.clone())).await?;
    let text = format!(
        "{} is to be protected towards {} whenever it runs here ({}){told}",
        enable.domain,
        policy.label(),
        path.display()
    );
    Ok(serde_json::json!({ "message": text }))
}

/// Takes the policy away; with `now` ends the protection too.
///
/// # Errors
/// `NotFound` when there is no policy and nothing to end.
pub async fn disable(socket: &std::path::Path, disable: &Disable) -> Result<serde_json::Value, ApiError> {
    let domain = &disable.domain;
    let was = policy::remove(&disable.folder, domain).map_err(|error| failed(&error))?;
    if !was && !disable.now {
        return Err(ApiError::new(
            ErrorCode::NotFound,
            format!("{domain} has no policy in {}", disable.folder.display()),
        ));
    }
    let told = tell(socket, None).await?;
    let mut text = format!("{domain} is not protected by itself any more{told}");
    if disable.now {
        match Call::start(socket, &Request::Unprotect { domain: domain.clone(), tag: None }).await?.result().await {
            Ok(value) => text.push_str(&format!("; {}", value["message"].as_str().unwrap_or_default())),
            Err(error) if error.code == ErrorCode::NotFound => text.push_str("; it was not protected"),
            Err(error) => return Err(error),
        }
    } else {
        text.push_str("; a protection that is under way goes on (`remus unprotect` ends it)");
    }
    Ok(serde_json::json!({ "message": text }))
}

/// Tells the daemon; what to add to the answer.
async fn tell(socket: &std::path::Path, domain: Option<String>) -> Result<&'static str, ApiError> {
    if !socket.exists() {
        return Ok("; remusd does not run now, and looks at it when it starts");
    }
    Call::start(socket, &Request::Reload { domain }).await?.result().await?;
    Ok("")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Args;
    use crate::cli::args::Command;

    fn typed(line: &str) -> Enable {
        match Args::try_parse_from(line.split(' ')).unwrap().command {
            Command::Enable(enable) => *enable,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_policy_is_written_and_taken_away_also_without_a_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, socket) = (dir.path().join("domains"), dir.path().join("no-socket"));
        let line = format!("remus enable web --to hostb -i 50 --reprotect --folder {}", folder.display());
        let told = enable(&socket, &typed(&line)).await.unwrap();
        assert!(told["message"].as_str().unwrap().contains("does not run now"), "{told}");
        let policy = policy::read(&folder).0.remove("web").unwrap();
        assert_eq!((policy.label().as_str(), policy.options.interval_ms), ("hostb", 50));
        assert_eq!(policy.options.then, crate::protect::options::Then::Back);

        let wish = Disable { domain: "web".into(), now: false, folder };
        assert!(disable(&socket, &wish).await.is_ok());
        assert_eq!(disable(&socket, &wish).await.unwrap_err().code, ErrorCode::NotFound);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for line in [
            "remus enable 3 --to b",
            "remus enable 9b6e7283-0000-0000-0000-000000000001 --to b",
            "remus enable web --to b -i 0",
        ] {
            assert_eq!(policy_of(&typed(line)).unwrap_err().code, ErrorCode::Invalid, "{line}");
        }
        assert!(Args::try_parse_from(["remus", "enable", "web"]).is_err(), "where to?");
    }
}
