//! Who may ask for what: whoever can open the socket may read; root and the members of one group may act.

use nix::unistd::{Gid, Group, Uid, User, getgrouplist};

use super::types::{ApiError, Caller, ErrorCode, Request};

/// The daemon's rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Besides root, members of this group may act.
    pub admin_group: Option<u32>,
}

impl Access {
    /// Decides about a request, and writes every acting one to the log with who made it. May ask the user database.
    ///
    /// # Errors
    /// `Denied`, with what to do.
    pub async fn check(self, request: &Request, caller: Caller) -> Result<(), ApiError> {
        if !request.acts() {
            return Ok(());
        }
        let allowed = caller.uid == 0 || self.is_admin(caller).await;
        let (uid, gid, pid) = (caller.uid, caller.gid, caller.pid);
        if caller.uid != 0 && request.names_a_program() {
            tracing::warn!(uid, gid, pid, ?request, "denied");
            let text = "Only root may say which command is run, since it runs as root: leave out ssh, command, stock_receiver, netbuffer_script, disk_scripts and a witness script";
            return Err(ApiError::new(ErrorCode::Denied, text));
        }
        if allowed {
            tracing::info!(uid, gid, pid, ?request, "asked to act");
            return Ok(());
        }
        tracing::warn!(uid, gid, pid, ?request, "denied");
        let who = match self.admin_group {
            Some(group) => format!("root and members of the group {} may", group_name(group)),
            None => "root may; `control.admins` in remusd.toml names a group that may too".into(),
        };
        Err(ApiError::new(ErrorCode::Denied, format!("User {uid} may not do this: only {who}")))
    }

    async fn is_admin(self, caller: Caller) -> bool {
        let Some(group) = self.admin_group else { return false };
        // The user database may be slow (LDAP).
        caller.gid == group || tokio::task::spawn_blocking(move || is_member(caller.uid, group)).await.unwrap_or(false)
    }
}

/// Whether the user database has the user in the group. Asked anew each time, so that a removal counts at once.
fn is_member(uid: u32, group: u32) -> bool {
    let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) else { return false };
    let Ok(name) = std::ffi::CString::new(user.name) else { return false };
    getgrouplist(&name, user.gid).is_ok_and(|groups| groups.contains(&Gid::from_raw(group)))
}

fn group_name(gid: u32) -> String {
    match Group::from_gid(Gid::from_raw(gid)) {
        Ok(Some(group)) => group.name,
        _ => gid.to_string(),
    }
}

/// A group by name or number, for the daemon's configuration.
///
/// # Errors
/// A sentence when there is no such group.
pub fn group(typed: &str) -> Result<u32, String> {
    if let Ok(gid) = typed.parse() {
        return Ok(gid);
    }
    match Group::from_name(typed) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        Ok(None) => Err(format!("there is no group {typed}; `groupadd --system {typed}` makes it")),
        Err(error) => Err(format!("group {typed}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::TargetSpec;
    use crate::ops::OperationId;

    fn caller(uid: u32, gid: u32) -> Caller {
        Caller { uid, gid, pid: Some(1) }
    }

    #[tokio::test]
    async fn everybody_reads_and_only_root_and_the_group_act() {
        let act = Request::Abort { job: OperationId(1), wait: false };
        let nobody = Access::default();
        assert_eq!(nobody.check(&Request::Jobs {}, caller(65_534, 65_534)).await, Ok(()));
        assert_eq!(nobody.check(&act, caller(0, 0)).await, Ok(()));
        let denied = nobody.check(&act, caller(65_534, 65_534)).await.unwrap_err();
        assert_eq!(denied.code, ErrorCode::Denied);
        assert!(denied.message.contains("65534"), "{denied}");
        let admins = Access { admin_group: Some(4711) };
        assert_eq!(admins.check(&act, caller(65_534, 4711)).await, Ok(()));
        assert!(admins.check(&act, caller(65_534, 65_534)).await.is_err());
        let command = TargetSpec { command: Some("sh".into()), ..TargetSpec::default() };
        let program =
            Request::Protect { domain: "g".into(), target: command, options: None, foreground: false, tag: None };
        let denied = admins.check(&program, caller(65_534, 4711)).await.unwrap_err();
        assert!(denied.message.contains("Only root"), "no shell of root's for the group: {denied}");
        assert_eq!(admins.check(&program, caller(0, 0)).await, Ok(()));
        assert!(is_member(0, 0), "root is in root by the user database");
    }

    #[test]
    fn groups_are_known_by_name_and_number() {
        assert_eq!((group("root"), group("7")), (Ok(0), Ok(7)));
        assert!(group("no-such-group").unwrap_err().contains("groupadd"));
    }
}
