//! Which rule a table belongs to, by name alone: for a site that has no catalog of the source at hand.

use std::collections::BTreeSet;

use globset::{GlobBuilder, GlobMatcher};

use crate::config::{Rule, TruncatePolicy};
use crate::model::TableName;

/// What TRUNCATE does to each table, by the rule that its name matches.
pub struct TruncatePolicies(Vec<(Vec<GlobMatcher>, Vec<GlobMatcher>, TruncatePolicy)>);

impl TruncatePolicies {
    /// From validated rules; a glob that can't be parsed was refused when the file was read, and matches nothing here.
    pub fn new(rules: &[Rule]) -> Self {
        let compile = |globs: &[String]| globs.iter().filter_map(|text| glob(text).ok()).collect();
        Self(rules.iter().map(|rule| (compile(&rule.include), compile(&rule.exclude), rule.truncate)).collect())
    }

    /// The policy for a table. A table that no rule names any more stops the flow at its TRUNCATE rather than being emptied.
    pub fn of(&self, table: &TableName) -> TruncatePolicy {
        let name = table.to_string();
        let any = |globs: &[GlobMatcher]| globs.iter().any(|glob| glob.is_match(&name));
        let found = self.0.iter().find(|(include, exclude, _)| any(include) && !any(exclude));
        found.map_or(TruncatePolicy::Stop, |(_, _, policy)| *policy)
    }
}

/// Of the tables given, those that no rule of a lane (`None`: rules without one) names.
pub fn unnamed<'t>(
    rules: &[Rule],
    lane: Option<&str>,
    tables: impl IntoIterator<Item = &'t TableName>,
) -> BTreeSet<TableName> {
    let compile = |globs: &[String]| globs.iter().filter_map(|text| glob(text).ok()).collect::<Vec<_>>();
    let rules = rules.iter().filter(|rule| rule.lane.as_deref() == lane);
    let rules: Vec<_> = rules.map(|rule| (compile(&rule.include), compile(&rule.exclude))).collect();
    let is_named = |table: &&TableName| {
        let name = table.to_string();
        let any = |globs: &[GlobMatcher]| globs.iter().any(|glob| glob.is_match(&name));
        rules.iter().any(|(include, exclude)| any(include) && !any(exclude))
    };
    tables.into_iter().filter(|table| !is_named(table)).cloned().collect()
}

/// A glob on `schema.table`: case-sensitive, `*` and `?` match any character.
///
/// # Errors
/// What is wrong with the glob.
pub(super) fn glob(text: &str) -> Result<GlobMatcher, globset::Error> {
    Ok(GlobBuilder::new(text).literal_separator(false).backslash_escape(true).build()?.compile_matcher())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ColumnRule;

    fn rule(include: &str, exclude: &str, truncate: TruncatePolicy) -> Rule {
        Rule {
            include: vec![include.to_owned()],
            exclude: vec![exclude.to_owned()],
            columns: ColumnRule::All,
            filter: None,
            truncate,
            lane: None,
            place: "f:1".to_owned(),
        }
    }

    #[test]
    fn a_table_is_named_by_a_rule_of_its_lane() {
        let night = Rule { lane: Some("night".to_owned()), ..rule("public.n*", "-", TruncatePolicy::Apply) };
        let rules = [rule("public.a*", "public.ab", TruncatePolicy::Apply), night];
        let tables = ["account", "ab", "n1", "other"].map(|name| TableName::new("public", name));
        let names = |lane| unnamed(&rules, lane, &tables).into_iter().map(|table| table.name).collect::<Vec<_>>();
        assert_eq!(
            (names(None), names(Some("night"))),
            (["ab", "n1", "other"].map(str::to_owned).to_vec(), ["ab", "account", "other"].map(str::to_owned).to_vec(),)
        );
    }

    #[test]
    fn the_first_matching_rule_decides() {
        let policies = TruncatePolicies::new(&[
            rule("public.a*", "public.ab", TruncatePolicy::Apply),
            rule("public.ab", "-", TruncatePolicy::Ignore),
        ]);
        for (name, policy) in
            [("account", TruncatePolicy::Apply), ("ab", TruncatePolicy::Ignore), ("log", TruncatePolicy::Stop)]
        {
            assert_eq!(policies.of(&TableName::new("public", name)), policy, "{name}");
        }
    }
}
